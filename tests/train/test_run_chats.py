"""Runs on conversations: loss on answers alone, the chat template of the saved model, and mixtures with text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from retnet.data import IGNORED, open_corpus
from retnet.data.build import build_shards
from retnet.data.chat_corpus import ChatCorpus
from retnet.data.chat_template import ENDED, PLAIN, ChatTemplate, find_chat_template
from retnet.data.tokenizer import ByteTokenizer
from retnet.data.whole_rows import WholeRows
from retnet.models.decode.generation import generate
from retnet.models.directory import load_model, save_model
from retnet.stack.resolve import resolve_tokenizer
from retnet.train.inputs import open_data
from retnet.train.run import train
from retnet.train.saved_tokenizer import tokenizer_to_save
from tests.serve.http.chat.models import CHATML, save_tokenizer
from tests.small_models import PAPER, small_model

from .conftest import losses, recipe_for

WORDS = ["state", "decay", "head", "token", "window", "mask", "layer", "norm", "gate", "chunk"]
SETTINGS = {"length": 128, "max_steps": 4, "gradient_accumulation_steps": 1}


def write_chats(path: Path, count: int = 60) -> Path:
    """Conversations in which the answer repeats a word of the question."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            messages = [{"role": "system", "content": "Repeat."}] if number % 3 == 0 else []
            for word in draw.sample(WORDS, 2):
                messages += [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def save_chatml_model(directory: Path) -> Path:
    tokenizer = save_tokenizer(directory, "byte level", CHATML)
    model = small_model([PAPER], vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.document_start, init="paper")
    save_model(model, directory)
    return directory


def test_a_run_learns_answers_and_saves_the_template_that_the_server_answers_with(byte_model, tmp_path, console):
    chats = write_chats(tmp_path / "chats.jsonl")
    recipe = recipe_for(byte_model, chats, tmp_path / "out", **SETTINGS, do_eval=True, num_samples=1)
    summary = train(recipe, console)
    values = list(losses(tmp_path / "out").values())
    assert values[-1] < values[0]
    text = console.file.getvalue()
    assert "conversations in the chat template plain, loss on" in text
    answers = [m["content"] for line in chats.open() for m in json.loads(line)["messages"] if m["role"] == "assistant"]
    assert summary.train_bytes + summary.valid_bytes == sum(map(len, answers))
    assert (tmp_path / "out/chat_template.jinja").read_text().strip() == ENDED.strip()
    found = find_chat_template(None, resolve_tokenizer(str(tmp_path / "out")), tmp_path / "out")
    assert found.turn_end == 256
    assert load_model(tmp_path / "out").eos_token_ids == (256,)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert bytes(ids).decode() == "User:\nhi\nAssistant:\n"


@pytest.mark.parametrize("carry_state", [False, True])
def test_the_targets_of_a_batch_are_the_answers_and_their_ends(tmp_path, carry_state):
    model, chats = save_chatml_model(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl")
    recipe = recipe_for(
        model, chats, tmp_path / "out", **SETTINGS | {"carry_state": carry_state, "per_device_train_batch_size": 2}
    )
    data = open_data(recipe, recipe.training_arguments())
    assert isinstance(data.train, WholeRows) != carry_state
    assert isinstance(data.corpus, ChatCorpus)
    tokenizer, targets, found = data.corpus.tokenizer, 0, []
    end = tokenizer.special_tokens["<|im_end|>"]
    for index in range(len(data.train)):
        row = data.train.row(index)
        learned = row["shift_labels"][row["shift_labels"] != IGNORED].tolist()
        targets += len(learned)
        found += learned
    assert targets == data.corpus.num_targets
    if carry_state:  # where an answer may go on in the next row of its lane
        return
    texts, run = [], []
    for token in found:
        if token == end:
            texts.append(tokenizer.decode(run))
            run = []
        else:
            run.append(token)
    assert set(texts) <= set(WORDS)
    assert len(texts) == 2 * len(data.corpus)


def test_the_saved_tokenizer_has_the_template_of_the_data_then_of_its_own_then_of_the_model(tmp_path, text_folder):
    model = save_chatml_model(tmp_path / "model")
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    build_shards([str(text_folder)], tmp_path / "shards", tokenizer=str(model), workers=1)
    shards, plain = open_corpus(tmp_path / "shards"), open_corpus(text_folder)
    own = find_chat_template(str(tmp_path / "own.jinja"), shards.tokenizer, None)
    several = ChatTemplate(ByteTokenizer(), "two", {"default": "a", "tool_use": "b"}, {})
    for corpus, directory, template, expected in (
        (shards, None, None, CHATML),
        (shards, model, own, "{{ messages }}"),
        (plain, None, None, None),
        (plain, model, None, CHATML),
        (plain, model, several, {"default": "a", "tool_use": "b"}),
    ):
        tokenizer = tokenizer_to_save(corpus, directory, template)
        tokenizer.save_pretrained(tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == expected
        found = find_chat_template(None, corpus.tokenizer, tmp_path / "saved")
        assert found.sources == (expected if isinstance(expected, dict) else {"default": expected or PLAIN})
        shutil.rmtree(tmp_path / "saved")
    before, after = AutoTokenizer.from_pretrained(model), tokenizer_to_save(shards)
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token) == ("<s>", "</s>")
    assert after("state <|im_end|> x")["input_ids"] == before("state <|im_end|> x")["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("choice", [None, "file"])
def test_the_template_of_the_model_is_used_and_kept_unless_another_is_chosen(tmp_path, console, choice):
    model, chats = save_chatml_model(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl", 20)
    settings = dict(SETTINGS)
    expected = CHATML
    if choice:
        expected = CHATML.replace("'\n' + message", "' says\n' + message")
        (tmp_path / "own.jinja").write_text(expected)
        settings["chat_template"] = tmp_path / "own.jinja"
    train(recipe_for(model, chats, tmp_path / "out", **settings), console)
    saved = (tmp_path / "out/chat_template.jinja").read_text()
    assert saved == expected
    tokenizer = resolve_tokenizer(str(tmp_path / "out"))
    assert tokenizer.same_tokens(resolve_tokenizer(str(model)))
    found = find_chat_template(None, tokenizer, tmp_path / "out")
    assert found.turn_end == tokenizer.special_tokens["<|im_end|>"]
    ends = load_model(tmp_path / "out").eos_token_ids
    assert found.turn_end in ends, "generate of transformers stops after an answer"
    settings["max_steps"] = 1
    train(recipe_for(tmp_path / "out", chats, tmp_path / "again", **SETTINGS), console)  # from its own weights
    assert (tmp_path / "again/chat_template.jinja").read_text() == expected


@pytest.mark.slow
def test_text_keeps_the_chat_template_of_the_model_and_of_its_tokenizer(tmp_path, console, text_folder):
    model = save_chatml_model(tmp_path / "model")
    build_shards([str(text_folder)], tmp_path / "shards", tokenizer=str(model), workers=1)
    assert (tmp_path / "shards/tokenizer").is_dir()
    train(recipe_for(model, tmp_path / "shards", tmp_path / "out", **SETTINGS), console)
    assert find_chat_template(None, resolve_tokenizer(str(tmp_path / "out")), tmp_path / "out").mentions("im_start")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    assert after.chat_template == before.chat_template
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token)
    assert after("state <|im_end|> x")["input_ids"] == before("state <|im_end|> x")["input_ids"]
    # A model of bytes has no tokenizer file, and may have a template.
    chats = write_chats(tmp_path / "chats.jsonl", 20)
    bytes_model = small_model([PAPER], vocab_size=257, bos_token_id=256, init="paper")
    save_model(bytes_model, tmp_path / "bytes")
    train(recipe_for(tmp_path / "bytes", chats, tmp_path / "chat", **SETTINGS), console)
    train(recipe_for(tmp_path / "chat", text_folder, tmp_path / "text", **SETTINGS), console)
    assert (tmp_path / "text/chat_template.jinja").read_text().strip() == ENDED.strip()
    train(recipe_for(tmp_path / "bytes", text_folder, tmp_path / "text", **SETTINGS), console)
    assert not (tmp_path / "text/chat_template.jinja").exists(), "a template of an earlier run is not left behind"


@pytest.mark.slow
def test_conversations_are_mixed_with_shards_of_the_same_tokens(tmp_path, console, text_folder):
    model, chats = save_chatml_model(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl")
    shards = tmp_path / "shards"
    build_shards([str(text_folder)], shards, tokenizer=str(model / "tokenizer.json"), document_start="<s>", workers=1)
    train(recipe_for(model, f"{{{chats}: 1, {shards}: 1}}", tmp_path / "out", **SETTINGS), console)
    assert "conversations in the chat template" in console.file.getvalue()


def test_what_cannot_be_a_conversation_of_the_model_is_refused(byte_model, text_folder, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", 4)
    for data, settings, message in (
        (text_folder, {"chat_template": "plain"}, "no source holds conversations; accepted with it: jsonl"),
        (chats, {"chat_template": "none"}, "chat_template is none with conversations"),
        (chats, {"length": 8}, "no conversation in .* has an answer to learn in its first 8 tokens"),
    ):
        recipe = recipe_for(byte_model, data, tmp_path / "out", **SETTINGS | settings)
        with pytest.raises(ValueError, match=message):
            open_data(recipe, recipe.training_arguments())
    recipe = recipe_for(byte_model, chats, tmp_path / "out", **SETTINGS, chat_template=tmp_path / "none.jinja")
    with pytest.raises(FileNotFoundError, match="no chat template at"):
        open_data(recipe, recipe.training_arguments())


@pytest.mark.slow
def test_a_chat_model_answers(tmp_path, console):
    """Trained on questions for one word each, it answers with that word and ends."""
    chats = write_chats(tmp_path / "chats.jsonl", 400)
    save_model(small_model([PAPER] * 2, vocab_size=257, bos_token_id=256, init="paper"), tmp_path / "model")
    settings = SETTINGS | {"max_steps": 150, "length": 256}
    train(recipe_for(tmp_path / "model", chats, tmp_path / "out", **settings), console)
    model, tokenizer = load_model(tmp_path / "out"), ByteTokenizer()
    template = find_chat_template(None, tokenizer, tmp_path / "out")
    right = 0
    for word in WORDS:
        ids = torch.tensor([template.encode([{"role": "user", "content": f"say {word}"}])])
        new = [int(token) for token in generate(model, ids, 12, temperature=0)]
        right += tokenizer.decode(new[: new.index(256)] if 256 in new else new) == word
    assert right >= 8
