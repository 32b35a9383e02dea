from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from retnet.data.tokenizer import ByteTokenizer
from retnet.data.tokenizer_json import JsonTokenizer
from retnet.serve.http.grammars.constraints import Constraints
from retnet.serve.http.grammars.vocabulary import text_of_tokens
from tests.serve.http.grammars.tools import at_random, constraint, draw

WORDS = ["state", "naïve", "φύσις", "状态", "😀", 'a "b": 1', "{ }", "[1, 2]"]


@pytest.fixture(scope="module", params=["byte-level BPE", "BPE with byte fallback"])
def tokenizer(request, tmp_path_factory) -> JsonTokenizer:
    """Trained tokenizers: like GPT-2's, and like Llama's."""
    special = ["<|end|>", "<unk>"]
    if request.param == "byte-level BPE":
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trained.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
        ])  # fmt: skip
        alphabet = []
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    trained.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(file))
    return JsonTokenizer(file, start=0, end=0)


def test_bytes_are_their_own_text():
    texts = text_of_tokens(ByteTokenizer(), 300)
    assert len(texts) == 300
    assert texts[:255] == [bytes([byte]) for byte in range(255)]
    assert set(texts[255:]) == {b""}  # 0xFF is in no text, 256 starts documents, the others are padding


def test_the_texts_of_tokens_make_up_the_text(tokenizer):
    texts = text_of_tokens(tokenizer, tokenizer.vocab_size + 7)
    assert len(texts) == tokenizer.vocab_size + 7
    assert texts[0] == b""
    assert set(texts[tokenizer.vocab_size :]) == {b""}
    for text in [*WORDS, " ".join(WORDS), "새 text\nwith lines"]:
        tokens = tokenizer.encode(text)
        assert b"".join(texts[token] for token in tokens).decode().lstrip(" ") == text


def test_outputs_of_trained_tokenizers_follow_a_grammar(tokenizer):
    vocab_size = tokenizer.vocab_size + 7
    constraints = Constraints(tokenizer, vocab_size, [0])
    try:
        for seed in range(10):
            tokens = draw(constraints, constraint(json_object=True), vocab_size, at_random(seed), most=300)
            if len(tokens) < 300:
                assert isinstance(json.loads(tokenizer.decode(tokens)), dict)
            tokens = draw(constraints, constraint(choice=["naïve 状态", "state", "😀"]), vocab_size, at_random(seed))
            assert tokenizer.decode(tokens) in {"naïve 状态", "state", "😀"}
    finally:
        constraints.close()
