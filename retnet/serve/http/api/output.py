"""Output: the tokens of one stream as text that a client may see, with what it asked to know of each token.

A character is sent with its last byte, and text that may be the beginning of a stop string when it is known not to be
one. Text of stop strings and of tokens that end the output is never sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from retnet.data.tokenizer import Tokenizer
from retnet.serve.http.api.fields import Stops
from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Piece, Stream
from retnet.serve.request import TokenLogprobs
from retnet.serve.stopping import StopStrings

REASONS = {"length": "length", "stop_token": "stop", "stop_string": "stop", "grammar_end": "stop"}


@dataclass(slots=True)
class OutputToken:
    """One generated token whose log-probability was asked for.

    begin, end: characters of the text before it, and with it; equal while the character that it begins is unfinished.
    text: None for the token's own; otherwise the part of it that the text has, "" for a token that ended it.
    """

    token: int
    logprobs: TokenLogprobs
    begin: int
    end: int
    text: str | None = None


@dataclass(slots=True)
class Delta:
    """New text of an output. The last delta has a finish_reason, in OpenAI's words: stop or length.

    tokens: those whose text is now complete, if log-probabilities were asked for. stop_reason: the stop string or stop
    token of the request that ended it. num_tokens: generated so far.
    """

    text: str
    tokens: list[OutputToken]
    num_tokens: int
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Output:
    """The deltas of a stream: `async for delta in output`, until one has a finish_reason.

    stops: those of the stream's request. logprobs: whether its log-probabilities were asked for.
    after: the tokens whose text this one continues; none for a text of its own, which begins without a space.

    Raises ApiError if the request fails or is ended by the server.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        stops: Stops,
        *,
        logprobs: bool = False,
        after: Sequence[int] = (),
    ):
        self.stream, self.stops = stream, stops
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._logprobs = logprobs
        self._text = StopStrings(stops.strings, tokenizer.stream_decoder(), after)
        self._num_taken = 0  # characters
        self._held: deque[OutputToken] = deque()
        self._failure: ApiError | None = None

    def __aiter__(self) -> Output:
        return self

    async def __anext__(self) -> Delta:
        while self.finish_reason is None:
            if self._failure is not None:
                raise self._failure
            delta = self._read(await anext(self.stream))
            if delta.text or delta.tokens or delta.finish_reason is not None:
                return delta
        raise StopAsyncIteration

    async def whole(self) -> Delta:
        """The whole output as one delta."""
        texts: list[str] = []
        tokens: list[OutputToken] = []
        while True:
            delta = await anext(self)
            texts.append(delta.text)
            tokens += delta.tokens
            if delta.finish_reason is not None:
                return Delta("".join(texts), tokens, self.num_tokens, delta.finish_reason, delta.stop_reason)

    def _read(self, piece: Piece) -> Delta:
        """The delta of a piece; it may be empty, unless the piece is the last."""
        tokens, reason, text = piece.tokens, piece.finish_reason, self._text
        self.num_tokens += len(tokens)
        if not self._logprobs:
            for token in tokens[:-1] if reason == "stop_token" else tokens:
                text.push(token)
        else:
            for i, token in enumerate(tokens):
                begin, is_end = text.length, reason == "stop_token" and i == len(tokens) - 1
                if not is_end:
                    text.push(token)
                self._held.append(OutputToken(token, piece.logprobs[i], begin, text.length, "" if is_end else None))
        if reason in REASONS:
            return self._last(reason, tokens)
        if reason is not None:
            self._failure = failure(reason, piece.error)  # after the text so far
        new = text.take()
        return Delta(new, self._complete(new), self.num_tokens)

    def _complete(self, new: str) -> list[OutputToken]:
        """The tokens whose text `new` completes, and those before them that have no text or began a character."""
        self._num_taken += len(new)
        if not (new and self._held):
            return []
        count = 0
        for i, token in enumerate(self._held, 1):
            if token.end > self._num_taken:
                break
            if token.end > token.begin:
                count = i
        return [self._held.popleft() for _ in range(count)]

    def _last(self, reason: str, tokens: list[int]) -> Delta:
        text = self._text
        text.flush()
        new = text.take(all=True)
        stop_reason = text.matched
        if stop_reason is None and reason == "stop_token" and tokens:
            stop_reason = self.stops.tokens.get(tokens[-1])
        elif stop_reason is not None:
            for token in self._held:
                if token.begin >= text.length:
                    token.text = ""
                elif token.end > text.length or token is self._held[-1]:
                    token.text = text.text[token.begin :]
        self.finish_reason = "stop" if text.matched is not None else REASONS[reason]
        return Delta(new, list(self._held), self.num_tokens, self.finish_reason, stop_reason)


def failure(reason: str, error: str | None) -> ApiError:
    """The error of a stream that did not end by itself."""
    if reason == "cancelled":
        return ApiError(503, error or "the server ended the request", code="cancelled")
    return ApiError(500, f"the request failed: {error}", code="generation_failed")
