"""The tokens of a text in blocks are those of the whole text, for every kind of tokenizer and odd text."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from retnet.data import blocks, stream_encoder
from retnet.data.blocks import cut_blocks
from retnet.data.tokenizer import ByteTokenizer
from retnet.data.tokenizer_json import JsonTokenizer

WORDS = [
    "state",
    "decay",
    "naïve",
    "φύσις",
    "状态模型",
    "😀",
    "It's",
    "don't",
    "1234567",
    "(x+y)",
    "aaaaaaa",
    "e\u0301",
]
WORDS += ["ﬁ", "▁", "\t", "http://a.b/c?d"]
ODD_SPACES = ["\n", "\n\n", "\r\n", "  ", "\xa0", "\u2003", "\u3000", "\x85", "\u2028", "\n\xa0", " \n  ", "\x1c"]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def odd_text(rng, size):
    """Words of many scripts between odd white space; some long runs of a space, a word, digits or letters."""
    parts, length = [], 0
    while length < size:
        word = rng.choice(WORDS)
        space = " " if rng.random() < 0.6 else rng.choice(ODD_SPACES)
        draw = rng.random()
        if draw < 0.003:
            space *= rng.randint(2, 2000)
        elif draw < 0.005:
            word *= rng.randint(2, 800)
        elif draw < 0.006:
            word = "".join(rng.choices("0123456789", k=2000))
        elif draw < 0.007:
            word = "".join(rng.choices("ACGT", k=6000))
        parts += [word, space]
        length += len(word) + len(space)
    return "".join(parts)


def byte_level(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    return tokenizer, trainer


def pieces(pre_tokenizer, normalizer=None):
    """BPE over pieces with byte fallback, as Llama 2 has; trained on words, then with the pre-tokenizer given."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", *BYTE_PIECES]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=["▁"], limit_alphabet=60, show_progress=False
    )

    def finish(trained):
        state = json.loads(trained.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTE_PIECES]
        state["pre_tokenizer"] = None
        trained = Tokenizer.from_str(json.dumps(state))
        if pre_tokenizer is not None:
            trained.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            trained.normalizer = normalizer
        return trained

    return tokenizer, trainer, finish


def unigram(pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = ["<s>", "<unk>"]
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )


def space_as_piece():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


pre = pre_tokenizers
KINDS = {
    "GPT-2": lambda: byte_level(pre.ByteLevel(add_prefix_space=False)),
    "GPT-2 with a space before the text": lambda: byte_level(pre.ByteLevel(add_prefix_space=True)),
    "cl100k": lambda: byte_level(
        pre.Sequence([pre.Split(Regex(CL100K), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    ),
    "Llama 2": lambda: pieces(None, space_as_piece()),
    "Metaspace": lambda: pieces(pre.Metaspace(prepend_scheme="always")),
    "Metaspace, at the first word": lambda: pieces(pre.Metaspace(prepend_scheme="first")),
    "Metaspace without words": lambda: pieces(pre.Metaspace(prepend_scheme="always", split=False)),
    "Unigram": lambda: unigram(pre.Metaspace()),
    "Unigram of stripped text": lambda: unigram(
        pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()]),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]),
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    trained, trainer, *finish = KINDS[request.param]()
    rng = random.Random(0)
    trained.train_from_iterator([odd_text(rng, 2000) for _ in range(12)], trainer)
    for step in finish:
        trained = step(trained)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return JsonTokenizer(path, trained.token_to_id("<s>"))


def encode(tokenizer, text):
    encoder, tokens, parts = tokenizer.stream_encoder(), [], 0
    for block, last in cut_blocks(text.encode()):
        part = encoder.push(block, last)
        tokens += part
        parts += bool(part)
    return tokens, parts


def test_tokens_of_a_text_in_blocks_are_those_of_the_whole(tokenizer, monkeypatch):
    rng = random.Random(1)
    for block_bytes in (1 << 13, 5003):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        text = odd_text(rng, 24_000)
        tokens, parts = encode(tokenizer, text)
        assert tokens == list(tokenizer.encode_batch([text.encode()])[0])
        assert parts > 1


@pytest.mark.parametrize("before", ["", "x" * 500])
def test_no_space_and_no_token_is_added_at_a_cut(tokenizer, monkeypatch, before):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 15)
    text = before + "".join(f"word {i}\n\u2003odd\n" for i in range(6000))
    tokens, parts = encode(tokenizer, text)
    assert tokens == list(tokenizer.encode_batch([text.encode()])[0])
    assert parts > 2


def test_a_window_grows_where_two_have_no_place_to_join(tmp_path, monkeypatch):
    trained, trainer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    trained.train_from_iterator(["aaaaaaa " * 50], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    text = "b" + "a" * 70_001 + " end"  # one word, whose tokens depend on where it begins
    assert encode(tokenizer, text)[0] == list(tokenizer.encode_batch([text.encode()])[0])
    monkeypatch.setattr(stream_encoder, "WINDOW", 50_000)
    with pytest.raises(ValueError, match=r"50,000 characters without a place where this tokenizer can stop between"):
        encode(tokenizer, text)


def test_bytes_are_their_own_tokens(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    text = "é状😀\u2003" * 100
    assert bytes(encode(ByteTokenizer(), text)[0]) == text.encode()


def test_a_block_that_is_not_utf8_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 1 \(0xff\)"):
        tokenizer.stream_encoder().push(b"a\xff", True)
