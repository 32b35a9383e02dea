"""Text deltas: what a client sees of tokens that arrive in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.data.tokenizer import ByteTokenizer, Tokenizer
from retnet.serve.http.api.fields import Stops
from retnet.serve.http.api.logprobs import TokenNames, chat_logprobs, completion_logprobs
from retnet.serve.http.api.output import Delta, Output
from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Piece
from retnet.serve.request import TokenLogprobs

BYTES = ByteTokenizer()


class Pieces:
    """A stream of given pieces."""

    def __init__(self, pieces: Iterable[Piece]):
        self._pieces = iter(pieces)

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> Piece:
        return next(self._pieces)


def pieces_of(tokens: Iterable[int], reason: str, error: str | None = None) -> list[Piece]:
    """One piece per token, the last with the reason."""
    pieces = [Piece([token], [TokenLogprobs(-1.0, {})]) for token in tokens] or [Piece([], [])]
    pieces[-1].finish_reason, pieces[-1].error = reason, error
    return pieces


def deltas(pieces: Iterable[Piece], tokenizer: Tokenizer = BYTES, stops: Stops | None = None, **options: Any):
    async def collect() -> list[Delta]:
        output = Output(Pieces(pieces), tokenizer, stops or Stops(), **options)  # type: ignore[arg-type]
        return [delta async for delta in output]

    return asyncio.run(collect())


def texts(text: bytes, reason: str = "length", *strings: str) -> list[str]:
    return [delta.text for delta in deltas(pieces_of(text, reason), stops=Stops(strings))]


def test_a_character_comes_with_its_last_byte_and_no_half_at_all():
    assert texts("a€b".encode()) == ["a", "€", "b"]
    assert texts("a€".encode()[:-1]) == ["a", "\ufffd"]


def test_a_replacement_character_of_the_text_itself_is_kept():
    assert texts("a\ufffdb".encode()) == ["a", "\ufffd", "b"]


def test_only_a_proper_prefix_of_a_stop_string_is_held_back():
    assert texts(b"xSxTOPx", "length", "STOP") == ["x", "Sx", "T", "O", "P", "x"]


def test_a_held_prefix_is_sent_when_the_output_ends_otherwise():
    assert texts(b"xSTO", "length", "STOP") == ["x", "STO"]
    assert texts(b"xSTO\x00", "stop_token", "STOP") == ["x", "STO"]


def test_the_text_of_stop_strings_and_end_tokens_is_never_sent():
    assert texts(b"abSTOP", "stop_string", "STOP") == ["a", "b", ""]
    last = deltas(pieces_of(b"ab!", "stop_token"), stops=Stops((), {33: 33}))[-1]
    assert (last.text, last.finish_reason, last.stop_reason, last.num_tokens) == ("", "stop", 33, 3)


def test_the_last_delta_alone_has_the_finish_reason():
    for reason, said in (("length", "length"), ("stop_token", "stop"), ("grammar_end", "stop")):
        found = [delta.finish_reason for delta in deltas(pieces_of(b"abc", reason))]
        assert found[-1] == said
        assert set(found[:-1]) == {None}
    [only] = deltas(pieces_of([], "length"))
    assert (only.text, only.finish_reason, only.num_tokens) == ("", "length", 0)


def test_tokens_that_came_while_nobody_read_are_one_delta():
    [delta] = deltas([Piece([*b"a\xe2\x82\xac"], [], "length")])
    assert (delta.text, delta.num_tokens) == ("a€", 4)


@pytest.mark.parametrize(("reason", "status"), [("failed", 500), ("cancelled", 503)])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_request_that_fails_raises_with_the_reason_after_its_text(reason, status, at_once):
    seen: list[str] = []
    apart = [*pieces_of(b"a", None), *pieces_of([], reason, "not finite")]

    async def collect() -> None:
        output = Output(Pieces(pieces_of(b"a", reason, "not finite") if at_once else apart), BYTES, Stops())
        async for delta in output:
            seen.append(delta.text)

    with pytest.raises(ApiError, match="not finite") as raised:
        asyncio.run(collect())
    assert raised.value.status == status
    assert seen == ["a"]


@given(st.text("ab€\ufffd", max_size=12), st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3), st.data())
def test_pieces_of_any_size_give_the_text_up_to_the_first_stop_string(text, strings, data):
    tokens = [*text.encode()]
    found = min((text.encode().find(s.encode()) for s in strings if s in text), default=None)
    if found is not None:  # the engine ends with the token that completes the first string
        ends = [text.encode().find(s.encode()) + len(s.encode()) for s in strings if s in text]
        tokens = tokens[: min(ends)]
        found = min(text.find(s) for s in strings if s.encode() in bytes(tokens))
    pieces = []
    reason = "length" if found is None else "stop_string"
    while tokens:
        count = data.draw(st.integers(1, len(tokens)))
        pieces.append(Piece(tokens[:count], [TokenLogprobs(-1.0, {})] * count))
        tokens = tokens[count:]
    pieces.append(Piece([], [], reason))
    given = deltas(pieces, stops=Stops(tuple(strings)), logprobs=True)
    shown = text if found is None else text[:found]
    assert "".join(delta.text for delta in given) == shown
    entries = [token for delta in given for token in delta.tokens]
    assert len(entries) == sum(len(piece.tokens) for piece in pieces)
    assert sorted(token.begin for token in entries if token.text is None) == [
        token.begin for token in entries if token.text is None
    ]
    sent = 0
    for delta in given:  # no log-probabilities of a token before its text
        sent += len(delta.text)
        assert all(token.end <= sent for token in delta.tokens if token.text is None)


def test_log_probabilities_have_offsets_bytes_and_finite_values():
    pieces = pieces_of("a€".encode(), "length")
    pieces[0].logprobs[0] = TokenLogprobs(float("-inf"), {98: -0.5})
    tokens = [token for delta in deltas(pieces, logprobs=True) for token in delta.tokens]
    names = TokenNames(BYTES)
    body = completion_logprobs(tokens, names, 10)
    assert body["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert body["text_offset"] == [10, 11, 11, 11]
    assert body["token_logprobs"] == [-9999.0, -1.0, -1.0, -1.0]
    assert body["top_logprobs"][0] == {"b": -0.5, "a": -9999.0}
    assert body["top_logprobs"][1] == {"bytes:\\xe2": -1.0}
    first, *rest = chat_logprobs(tokens, names)["content"]
    assert first == {
        "token": "a",
        "logprob": -9999.0,
        "bytes": [97],
        "top_logprobs": [
            {"token": "b", "logprob": -0.5, "bytes": [98]},
            {"token": "a", "logprob": -9999.0, "bytes": [97]},
        ],
    }
    assert [entry["bytes"] for entry in rest] == [[0xE2], [0x82], [0xAC]]
    assert rest[0]["top_logprobs"] == []


def test_tokens_of_a_stop_string_have_log_probabilities_and_no_text():
    """One entry per token, as clients count on: lm-eval leaves out the last."""
    tokens = [t for d in deltas(pieces_of(b"ab!", "stop_token"), logprobs=True) for t in d.tokens]
    assert completion_logprobs(tokens, TokenNames(BYTES))["tokens"] == ["a", "b", ""]
    pieces = pieces_of(b"abST", "stop_string")
    tokens = [t for d in deltas(pieces, stops=Stops(("ST",)), logprobs=True) for t in d.tokens]
    assert completion_logprobs(tokens, TokenNames(BYTES))["tokens"] == ["a", "b", "", ""]
    assert [entry["token"] for entry in chat_logprobs(tokens, TokenNames(BYTES))["content"]] == ["a", "b"]
