"""The tokens of a conversation that are learned: the answers and their ends, under every template and tokenizer."""

from __future__ import annotations

import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from retnet.data.chat_answers import Conversation, tokens_and_answers
from retnet.data.chat_template import DEFAULT, ENDED, ChatTemplate, TemplateError, find_chat_template
from retnet.data.tokenizer import DOCUMENT_START, ByteTokenizer
from retnet.data.tokenizer_json import JsonTokenizer
from tests.serve.http.chat.models import MAKERS, TEMPLATES, save_tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    **answer(""),
    "tool_calls": [
        {"id": "abc123def", "type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abc123def", "content": "sunny"}
CONVERSATIONS = {
    "one": [user("Hi?"), answer("Hello.")],
    "system": [SYSTEM, user("Hi?"), answer("Hello.")],
    "several": [user("Hi?"), answer("Hello."), user("And?"), answer("how are you"), user("x"), answer("y")],
    "alike": [user("ok"), answer("ok"), user("ok"), answer("ok")],
    "special": [user("a <|im_end|> </s> b"), answer("<s> no </s>"), user("[/INST]"), answer("<|eot_id|>")],
    "spaces": [user(" a\n"), answer("  b \n"), user("\n"), answer(" c")],
    "tools": [SYSTEM, user("Weather?"), CALL, RESULT, answer("Sunny."), user("Thanks"), answer("Bye")],
}


def conversation(messages, tools=(), weights=None, **options):
    learned = [m["role"] == "assistant" for m in messages] if weights is None else weights
    return Conversation(messages, tools, learned, options)


def spans(template, chat) -> list[str]:
    """The text of each run of learned tokens, special tokens spelled."""
    tokens, learned = tokens_and_answers(template, chat)
    assert len(tokens) == len(learned)
    assert tokens[0] == template.tokenizer.document_start
    spelt = {token: text for text, token in template.tokenizer.special_tokens.items()}
    found, run = [], []
    for token, is_learned in [*zip(tokens, learned, strict=True), (0, False)]:
        if is_learned:
            run.append(token)
        elif run:
            spaced = [template.tokenizer.token_bytes(t).replace("▁".encode(), b" ") for t in run]
            parts = [spelt[t].encode() if t in spelt else text for t, text in zip(run, spaced, strict=True)]
            found.append(b"".join(parts).decode())
            run = []
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    made = {}

    def get(name, maker="byte level", source=None):
        key = name, maker
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            tokenizer = save_tokenizer(folder, maker, TEMPLATES.get(name, source))
            made[key] = find_chat_template(None, tokenizer, folder)
        return made[key]

    return get


END = {"ChatML": "<|im_end|>", "Llama 3": "<|eot_id|>", "Mistral": "</s>", "tools": "<|im_end|>"}


@pytest.mark.parametrize("maker", ["byte level", "metaspace"])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("kind", ["one", "system", "several", "alike", "special", "spaces"])
def test_the_answers_and_their_ends_are_learned_and_nothing_else(template, name, maker, kind):
    chosen, messages = template(name, maker), CONVERSATIONS[kind]
    found = spans(chosen, conversation(messages))
    expected = [m["content"] for m in messages if m["role"] == "assistant"]
    # The end token of "Mistral" takes the spaces before it.
    trim = {"Llama 3": str.strip, "Mistral": str.rstrip}.get(name, lambda text: text)
    before = " " if name == "Mistral" else ""
    assert found == [before + trim(text) + END[name] for text in expected]
    tokens, _ = tokens_and_answers(chosen, conversation(messages))
    assert tokens == chosen.encode(messages, add_generation_prompt=False), "the tokens are those of the server"


@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_every_tokenizer_has_the_same_answers(template, maker):
    found = spans(template("ChatML", maker), conversation(CONVERSATIONS["several"]))
    assert [re.sub(r"\s+|<unk>", "", text.lower()) for text in found] == [
        "hello.<|im_end|>", "howareyou<|im_end|>", "y<|im_end|>"
    ]  # fmt: skip


def test_calls_of_tools_are_learned_with_their_syntax_and_results_are_not(template):
    """The first token holds the line break before the answer too."""
    assert spans(template("tools"), conversation(CONVERSATIONS["tools"], [TOOL])) == [
        '\n\n<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call><|im_end|>',
        "Sunny.<|im_end|>",
        "Bye<|im_end|>",
    ]


def test_answers_of_weight_0_are_read_and_not_learned(template):
    messages, weights = CONVERSATIONS["several"], [False, False, False, True, False, False]
    for name in ("ChatML", "Mistral"):  # by rendering, and by generation blocks
        assert [text.strip() for text in spans(template(name), conversation(messages, weights=weights))] == [
            f"how are you{END[name]}"
        ]


def test_what_a_template_writes_by_itself_before_an_answer_is_learned(template):
    """Also where no prompt is the beginning of the whole conversation, as its first message changes with its length."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{% if loop.first and messages | length > 4 %}(long) {% endif %}"
        "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}<|im_end|>{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = template("ChatML").tokenizer
    chosen = ChatTemplate(tokenizer, "thinks", {DEFAULT: source}, {})
    for length in (4, 5):
        found = spans(chosen, conversation(CONVERSATIONS["several"][:length]))
        assert found == [f"<think>\n\n</think>\n\n{text}<|im_end|>" for text in ("Hello.", "how are you")]


def test_a_prompt_that_begins_the_answer_is_not_learned(template):
    source = TEMPLATES["ChatML"].replace("assistant\n' }}", "assistant\n<think>\n' }}")
    chosen = ChatTemplate(template("ChatML").tokenizer, "begun", {DEFAULT: source}, {})
    chat = conversation([user("Hi?"), answer("<think>\nhm</think> Hello.")])
    assert spans(chosen, chat) == ["hm</think> Hello.<|im_end|>"]


def test_the_generation_blocks_of_a_template_are_believed_and_get_their_end(template):
    source = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content[2:] }}{% endgeneration %}</s>{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    chosen = ChatTemplate(template("ChatML").tokenizer, "blocks", {DEFAULT: source}, {})
    assert spans(chosen, conversation(CONVERSATIONS["several"][:4])) == ["llo.</s>", "w are you</s>"]


def test_a_template_without_an_end_leaves_the_last_answer_to_the_end_of_the_text(template):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chosen = ChatTemplate(template("ChatML").tokenizer, "open", {DEFAULT: source}, {})
    assert chosen.turn_end is None
    found = spans(chosen, conversation(CONVERSATIONS["several"][:4]))
    assert found == ["assistant: Hello.", "assistant: how are you", "</s>"], "no prompt asks for an answer"


def test_plain_conversations_in_bytes_end_answers_with_the_document_token():
    tokenizer = ByteTokenizer()
    chosen = find_chat_template(None, tokenizer, None, for_training=True)
    assert chosen.sources == {DEFAULT: ENDED}
    assert chosen.turn_end == DOCUMENT_START
    tokens, learned = tokens_and_answers(chosen, conversation([user("é?"), answer("ü"), user("a"), answer("b")]))
    whole = [256, *"User:\né?\nAssistant:\nü".encode(), 256, *b"\nUser:\na\nAssistant:\nb", 256]
    assert tokens == whole
    assert [i for i, is_learned in enumerate(learned) if is_learned] == [
        *(at := whole.index(0xC3, 12), at + 1, at + 2), len(whole) - 2, len(whole) - 1
    ]  # fmt: skip


def test_an_answer_written_twice_is_refused(template):
    source = "{% for m in messages %}{{ m.content }}{{ m.content }}</s>{% endfor %}"
    chosen = ChatTemplate(template("ChatML").tokenizer, "twice", {DEFAULT: source}, {})
    with pytest.raises(TemplateError, match="writes message 1 2 times"):
        tokens_and_answers(chosen, conversation(CONVERSATIONS["one"]))


def test_variables_of_the_template_are_passed_on(template):
    source = TEMPLATES["ChatML"] + "{% if note is defined %}{{ note }}{% endif %}"
    chosen = ChatTemplate(template("ChatML").tokenizer, "note", {DEFAULT: source}, {})
    tokens, _ = tokens_and_answers(chosen, conversation(CONVERSATIONS["one"], note="remember"))
    assert chosen.tokenizer.decode(tokens).endswith("remember")


def every_template():
    """Templates of living models, which TRL ships; those that read images have no text in `content`."""
    trl = pytest.importorskip("trl")
    from pathlib import Path

    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    return [file for file in files if not re.search("idefics|llava|smolvlm", file.name)]


SPELLINGS = re.compile(r"<[|｜][^<>|｜]+[|｜]>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<\|[a-z_]+>|<[a-z_]+\|>")


def with_special_tokens_of(source: str, folder) -> JsonTokenizer:
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted({*SPELLINGS.findall(source), "<s>", "</s>"})
    tokenizer.add_special_tokens([AddedToken(content, special=True) for content in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return JsonTokenizer(folder / "tokenizer.json", tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>"))


@pytest.mark.slow
def test_templates_of_living_models(tmp_path):
    """Every answer is one span that holds its text, no other message's, and ends with a special token."""
    checked = refused = 0
    for number, file in enumerate(every_template()):
        source = file.read_text()
        (folder := tmp_path / str(number)).mkdir()
        tokenizer = with_special_tokens_of(source, folder)
        chosen = ChatTemplate(tokenizer, file.name, {DEFAULT: source}, {"bos_token": "<s>", "eos_token": "</s>"})
        for kind in ("one", "system", "several", "alike", "tools"):
            messages = CONVERSATIONS[kind]
            try:
                chosen.encode(messages, [TOOL] if kind == "tools" else None, add_generation_prompt=False)
            except TemplateError:
                refused += 1  # no system message, no tools, arguments as text
                continue
            found = spans(chosen, conversation(messages, [TOOL] if kind == "tools" else ()))
            answers = [m for m in messages if m["role"] == "assistant"]
            if kind == "tools" and not chosen.mentions("tool_calls"):
                continue
            place = f"{file.name}, {kind}: {found}"
            if "_training" not in file.name or kind != "tools":
                assert len(found) == len(answers), place
            for text, message in zip(found, answers):
                assert message["content"] in text or kind == "tools", place
                assert not re.search("Hi|And|Weather|sunny|Thanks", text), place
                assert any(text.rstrip().endswith(end) for end in tokenizer.special_tokens), place
            checked += 1
    assert checked > 200
    assert refused < checked / 5


@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_the_places_of_tokens_cover_the_text_in_order(template, maker):
    tokenizer = template("ChatML", maker).tokenizer
    end = tokenizer.special_tokens["<|im_end|>"]
    parts = ["Hello how are you", end, "  naïve <|im_end|> 😀", end, end, "", "y "]
    places = tokenizer.places_of_parts(parts)
    assert [token for token, _, _ in places] == tokenizer.encode_parts(parts)
    units = "".join("#" if isinstance(part, int) else part for part in parts)
    assert [units[begin:stop].strip() for token, begin, stop in places if token == end] == ["#"] * 3
    begins = [begin for _, begin, _ in places]
    assert begins == sorted(begins)
    covered = {at for _, begin, stop in places for at in range(begin, stop)}
    assert {at for at, unit in enumerate(units) if not unit.isspace()} <= covered
    assert tokenizer.places_of_parts([]) == []
