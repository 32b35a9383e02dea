"""Stop strings in text whose pieces do not follow token boundaries."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.data.stream_decoder import ends_inside_character
from retnet.data.tokenizer import ByteTokenizer
from retnet.serve.stopping import StopStrings


def utf8(tokens) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def push_all(stops: StopStrings, data: bytes) -> str | None:
    for byte in data:
        if (matched := stops.push(byte)) is not None:
            return matched
    return None


@pytest.mark.parametrize(
    ("text", "strings", "matched", "left"),
    [
        ("one two three", ["wo t"], "wo t", "one t"),
        ("naïve café—ok", ["é—"], "é—", "naïve caf"),
        ("日本語テキスト", ["語テ"], "語テ", "日本"),
        ("aaab", ["aab", "ab"], "aab", "a"),
        ("stop", ["s"], "s", ""),
        ("nothing here", ["there", "her e"], None, "nothing here"),
    ],
)
def test_strings_are_found_over_bytes_of_unfinished_characters(text, strings, matched, left):
    stops = StopStrings(strings, utf8)
    assert push_all(stops, text.encode()) == matched
    assert stops.text == left


def test_tokens_that_decode_differently_in_context_stream_the_whole_text():
    words = ["▁a", "▁b", "c", "▁"]

    def pieces(tokens) -> str:  # a first space is dropped, as sentencepiece does
        return "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ")

    tokens = [0, 1, 2, 0, 1, 1, 2, 0]
    stops = StopStrings(["zzz"], pieces)
    for token in tokens:
        stops.push(token)
    assert stops.text == pieces(tokens)


def test_the_cost_per_token_is_the_decoding_of_a_few_tokens():
    asked = []

    def counted(tokens) -> str:
        asked.append(len(tokens))
        return utf8(tokens)

    push_all(StopStrings(["never"], counted), b"x" * 500)
    assert max(asked) <= 2


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["a", ""], utf8)


def test_a_complete_stop_string_is_found_before_an_unfinished_character():
    vocabulary = [b"he", b"STOP\xe6", b"\x97", b"x"]
    stops = StopStrings(["STOP"], lambda tokens: b"".join(vocabulary[t] for t in tokens).decode("utf-8", "replace"))
    assert [stops.push(token) for token in (0, 1)] == [None, "STOP"]
    assert stops.text == "he"


def test_bytes_that_never_become_a_character_are_not_held_for_ever():
    decoded = []

    def decode(tokens):
        decoded.append(len(tokens))
        return bytes(tokens).decode("utf-8", "replace")

    stops = StopStrings(["never"], decode)
    for _ in range(500):
        stops.push(0x80)
    assert max(decoded) < 100
    assert push_all(stops, b"so never") == "never"


def test_text_is_taken_as_soon_as_no_stop_string_can_reach_into_it():
    stops = StopStrings(["abc", "bd"], utf8)
    taken = []
    for byte in b"xababd":
        stops.push(byte)
        taken.append(stops.take())
    assert taken == ["x", "", "", "ab", "", "a"]
    assert stops.matched == "bd"
    assert stops.text == "xaba"
    assert stops.push(120) == "bd"  # the output has ended
    assert stops.take(all=True) == ""


def test_an_unfinished_character_joins_the_text_at_the_end():
    stops = StopStrings(["abc"], utf8)
    push_all(stops, "xab€".encode()[:-1])
    assert stops.text == "xab"
    assert stops.flush() is None
    assert stops.take(all=True) == stops.text == "xab\ufffd"


def test_without_stop_strings_the_text_is_only_decoded():
    stops = StopStrings([], utf8)
    assert [stops.push(byte) or stops.take() for byte in "aé".encode()] == ["a", "", "é"]


@given(st.lists(st.sampled_from([*"\ufffd€😀a".encode(), 0x80, 256]), max_size=30))
def test_the_text_of_a_tokenizers_tokens_lacks_the_unfinished_character_alone(tokens):
    """A U+FFFD of the text itself is there at once, and at the end nothing is missing."""
    decode = ByteTokenizer().decode
    stops = StopStrings(["never"], decode)
    for count, token in enumerate(tokens, 1):
        stops.push(token)
        unfinished = ends_inside_character(ByteTokenizer().decode_bytes(tokens[:count]))
        assert stops.text == decode(tokens[:count])[: -1 if unfinished else None]
    stops.flush()
    assert stops.text == decode(tokens)


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=6), st.lists(st.text("abc", max_size=4), max_size=12))
def test_the_string_that_begins_first_ends_the_text_at_once(strings, pieces):
    stops, text, taken = StopStrings(strings, lambda tokens: "".join(pieces[token] for token in tokens)), "", ""
    for token, piece in enumerate(pieces):
        text += piece
        found = min(((text.find(string), string) for string in strings if string in text), default=None)
        assert stops.push(token) == (None if found is None else found[1])
        taken += stops.take()
        if found is not None:
            assert stops.text == text[: found[0]] == taken
            return
        begun = (n for n in range(len(text), 0, -1) if any(string.startswith(text[-n:]) for string in strings))
        assert stops.text == text
        assert taken == text[: len(text) - next(begun, 0)]
    assert taken + stops.take(all=True) == text


STRINGS = {
    "thousands": [f"stop{i}" for i in range(4000)],
    "thousands that nearly match": ["a" * i + "b" for i in range(1, 400)],
    "one that is very long and nearly matches": ["a" * 20_000 + "b"],
}


@pytest.mark.parametrize("kind", STRINGS)
def test_the_time_per_token_does_not_depend_on_the_stop_strings(kind):
    def milliseconds(strings: list[str], text: bytes = b"a" * 3000) -> float:
        stops, begin = StopStrings(strings, utf8), time.process_time()
        for byte in text:
            stops.push(byte)
            stops.take()
        return 1e3 * (time.process_time() - begin)

    one = min(milliseconds(["never"]) for _ in range(3))
    assert min(milliseconds(STRINGS[kind]) for _ in range(3)) < 5 * one
