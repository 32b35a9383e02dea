"""The streaming decoder: its pieces join to the whole text, at a cost linear in the number of tokens."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from retnet.data.stream_decoder import StreamDecoder, ends_inside_character, stream_decoder_of
from retnet.data.tokenizer import ByteTokenizer, byte_characters
from retnet.data.tokenizer_json import JsonTokenizer

WORDS = ["a", "b", "\ufffd", "né", "😀", "日本", ".", ",", "!", "'", "n't", "'s", " ", "  ", "x y"]


def byte_level() -> Tokenizer:
    """Single bytes, some merged tokens with whole and partial characters, and U+FFFD whole and in parts."""
    characters = byte_characters()
    merged = [
        b" a",
        "é".encode(),
        b"x\xc3",
        b"\xa9y",
        "日".encode()[:2],
        "\ufffd".encode(),
        b"\xbf\xbd z",
        b"  ",
    ]
    pieces = [bytes([b]) for b in range(256)] + merged
    vocabulary = {"".join(characters[b] for b in piece): i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama(strip: bool) -> Tokenizer:
    """Metaspace words with bytes to fall back on: Llama's decoder, or the Metaspace decoder beside byte fallback."""
    pieces = ["▁", "▁▁", *WORDS, *(f"▁{word}" for word in WORDS), *(f"<0x{b:02X}>" for b in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    fallback, fuse = decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), fallback, fuse, decoders.Strip(" ", 1, 0)]
        if strip
        else [fallback, decoders.Metaspace()]
    )
    return tokenizer


def word_pieces(cleanup: bool) -> Tokenizer:
    pieces = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=cleanup)
    return tokenizer


def end_of_word() -> Tokenizer:
    pieces = [*WORDS, *(f"{word}</w>" for word in WORDS), "</w>"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


KINDS = {
    "byte-level BPE": byte_level(),
    "Llama": llama(strip=True),
    "Metaspace": llama(strip=False),
    "WordPiece": word_pieces(cleanup=False),
    "WordPiece, cleaned up": word_pieces(cleanup=True),
    "BPE with ends of words": end_of_word(),
    "words between spaces": Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a")),
}
SPECIAL = ("<s>", "<|end|>")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> JsonTokenizer:
    """The number of ordinary tokens is `text_vocab_size`; special tokens and padding of the vocabulary follow."""
    loaded = Tokenizer.from_str(KINDS[request.param].to_str())
    loaded.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    loaded.save(str(file))
    return JsonTokenizer(file, loaded.token_to_id("<s>"))


class Counted:
    """A decode function that counts the tokens that it is given."""

    def __init__(self, decode):
        self.decode, self.most, self.total = decode, 0, 0

    def __call__(self, tokens) -> str:
        self.most, self.total = max(self.most, len(tokens)), self.total + len(tokens)
        return self.decode(tokens)


def streamed(decoder: StreamDecoder, tokens) -> str:
    return "".join(decoder.push(token) for token in tokens) + decoder.flush()


@settings(max_examples=70)
@given(data=st.data())
def test_the_pieces_joined_are_the_text_of_the_whole(tokenizer, data):
    """Any tokens: special ones and padding of the vocabulary among them, bytes that are no characters, many spaces."""
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=40))
    assert streamed(tokenizer.stream_decoder(), tokens) == tokenizer.decode(tokens)


@settings(max_examples=70)
@given(data=st.data())
def test_a_plain_decode_function_also_streams_the_whole_text(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=40))
    assert streamed(StreamDecoder(tokenizer.decode), tokens) == tokenizer.decode(tokens)


@settings(max_examples=70)
@given(data=st.data())
def test_a_token_may_be_repeated_any_number_of_times(tokenizer, data):
    one, other = (data.draw(st.integers(0, tokenizer.vocab_size + 1)) for _ in range(2))
    tokens = [one] * data.draw(st.integers(1, 60)) + [other] * data.draw(st.integers(1, 60)) + [one]
    assert streamed(StreamDecoder(tokenizer.decode), tokens) == tokenizer.decode(tokens)
    assert streamed(tokenizer.stream_decoder(), tokens) == tokenizer.decode(tokens)


@settings(max_examples=40)
@given(text=st.text())
def test_text_comes_back_one_whole_character_at_a_time(text):
    text = text.encode(errors="replace").decode()
    decoder = ByteTokenizer().stream_decoder()
    pieces = [decoder.push(token) for token in text.encode()]
    assert decoder.flush() == ""
    assert [piece for piece in pieces if piece] == list(text)


@settings(max_examples=40)
@given(st.binary())
@example(b"\xf0\x9f\x98")
@example(b"\xe2\x82\xac\xf0\x9f")
@example(b"a\x80\x80")
def test_an_unfinished_character_at_the_end_of_bytes_is_recognised(data):
    def text(data: bytes) -> str:
        return data.decode(errors="replace")

    later = (b"\x80", b"\x90", b"\xa0", b"\x82\xac")
    unfinished = any(text(data + rest) != text(data) + text(rest) for rest in later)
    assert ends_inside_character(data) == unfinished


@pytest.mark.parametrize("known_bytes", [True, False], ids=["bytes known", "decode alone"])
def test_the_replacement_character_of_a_text_itself_is_kept_in_order(tmp_path, known_bytes):
    KINDS["byte-level BPE"].save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", 0)
    mark = 256 + 5
    decoder = tokenizer.stream_decoder() if known_bytes else StreamDecoder(tokenizer.decode)
    pieces = [decoder.push(token) for token in (98, mark, *"\ufffd".encode(), 99, mark, 100)]
    expected = ["b", "\ufffd", "", "", "\ufffd", "c", "\ufffd", "d"] if known_bytes else None
    if known_bytes:  # at once
        assert pieces == expected
    else:  # with the next character
        assert pieces == ["b", "", "", "", "", "\ufffd\ufffdc", "", "\ufffdd"]


def test_a_replacement_character_is_not_held_back_beyond_three_of_them():
    decoder = StreamDecoder(ByteTokenizer().decode)
    pieces = [decoder.push(token) for token in "\ufffd".encode() * 6]
    assert "".join(pieces) == "\ufffd" * 3
    assert decoder.flush() == "\ufffd" * 3


@pytest.mark.parametrize("known_bytes", [True, False], ids=["bytes known", "decode alone"])
def test_the_cost_is_a_few_decoded_tokens_per_token(tokenizer, known_bytes):
    """Also over long runs of tokens that decode to nothing, and of bytes that are no characters."""
    length = 2000
    special, padding = tokenizer.document_start, tokenizer.vocab_size
    ordinary = list(range(min(300, tokenizer.text_vocab_size)))
    runs = [
        [0xE2, *[special] * 60],
        list(range(padding, padding + length)),
        [special],
        [padding],
        [special, padding],
        [0],
        [1, special],
        ordinary,
        [ordinary[-1]],
        [0xE2, special, 0x80],
    ]
    for run in runs:
        tokens = run * (length // len(run))
        counted = Counted(tokenizer.decode)
        decoder = tokenizer.stream_decoder() if known_bytes else StreamDecoder(counted)
        decoder._decode = counted
        assert streamed(decoder, tokens) == tokenizer.decode(tokens)
        assert counted.total < 60 * len(tokens) + 1000
        assert counted.most < 50


@pytest.mark.parametrize("errors", ["replace", "ignore", "surrogateescape"])
@settings(max_examples=60)
@given(data=st.data())
def test_functions_that_drop_or_mark_unfinished_characters_stream_the_whole_text(errors, data):
    """Also with many tokens that have no text inside a character."""
    characters = st.sampled_from(["a", " ", "é", "€", "😀", "\ufffd"])
    whole = "".join(data.draw(st.lists(characters, min_size=1, max_size=20))).encode()
    gap = data.draw(st.integers(0, 3 if errors == "ignore" else 40))
    tokens = [token for byte in whole for token in (byte, *[256] * gap)]
    decoder = StreamDecoder(lambda tokens: bytes(t for t in tokens if t < 256).decode(errors=errors))
    assert streamed(decoder, tokens) == whole.decode()


@given(text=st.text("ab \n"))
def test_functions_that_strip_spaces_stream_the_whole_text(text):
    for decode in (lambda t: bytes(t).decode().strip(), lambda t: " ".join(bytes(t).decode().split())):
        assert streamed(StreamDecoder(decode), text[:12].encode()) == decode(text[:12].encode())


def test_streaming_continues_after_text_that_is_rewritten():
    """Transformers' Llama decoder turns a whole run of bytes into U+FFFD when a later byte is wrong."""
    loaded = KINDS["Llama"]
    word, other = loaded.token_to_id("▁a"), loaded.token_to_id("b")
    euro, cry = ([loaded.token_to_id(f"<0x{b:02X}>") for b in text.encode()] for text in "€😀")
    wrong = loaded.token_to_id("<0x80>")
    assert streamed(StreamDecoder(loaded.decode), [word, *euro, *cry, other]) == "a€😀b"
    text = streamed(StreamDecoder(loaded.decode), [word, *euro, wrong, other, word])
    assert text.startswith("a€")
    assert text.endswith("b a")


def test_the_decoder_needs_the_standard_library_alone():
    code = "import sys, retnet.data.stream_decoder; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert not {"numpy", "tokenizers", "torch", "transformers"} & set(json.loads(done.stdout))


def test_a_function_that_gives_no_text_is_named_and_the_text_before_it_stays():
    decoder = StreamDecoder(lambda tokens: None if 7 in tokens else "é" * len(tokens))
    assert decoder.push(1) == "é"
    with pytest.raises(TypeError, match="decode gave None; accepted: text"):
        decoder.push(7)
    assert decoder.flush() == ""
    assert decoder.push(1) == "é"


def test_another_method_of_a_tokenizer_is_the_function_that_decodes():
    class Loud(ByteTokenizer):
        def loud(self, tokens) -> str:
            return self.decode(tokens).upper()

    assert streamed(stream_decoder_of(Loud().loud), b"ab") == "AB"
    assert streamed(stream_decoder_of(Loud().decode), b"ab") == "ab"
