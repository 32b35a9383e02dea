"""Streams: the outputs of requests on their way from the engine's thread to an event loop.

A mailbox belongs to one event loop. The engine's thread leaves there what a step brought for all its streams, and wakes
the loop up once. A stream that is not read collects its tokens and hands them over as one piece.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from retnet.serve.http.access.record import Record
from retnet.serve.request import Generation, TokenLogprobs


@dataclass(slots=True)
class Piece:
    """What a stream got since its last piece. The last piece of a stream has a finish_reason.

    finish_reason: the engine's (`Generation`). error: why the output ended early, where that was no client's doing.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None = None
    error: str | None = None


class News(NamedTuple):
    """What one step brought for a stream."""

    stream: Stream
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    error: str | None


class Mailbox:
    """What the engine's thread has for one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._batches: deque[list[News]] = deque()
        self._scheduled = False

    def post(self, batch: list[News]) -> None:
        """From the engine's thread. A loop that is behind gets several batches in one callback."""
        self._batches.append(batch)
        if not self._scheduled:
            self._scheduled = True
            self.call(self._deliver)

    def call(self, function: Callable[..., object], *arguments: object) -> bool:
        """Call a function in the event loop; False if that has ended."""
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _deliver(self) -> None:
        self._scheduled = False  # before the batches are taken: what comes after the last one schedules again
        while self._batches:
            for news in self._batches.popleft():
                news.stream.receive(news)


class Stream:
    """The output of one request, for the event loop that submitted it.

    Leaving `async with stream` cancels the request, wherever it is.
    times: when it was submitted, when it got a slot, and when its first and last tokens came (time.perf_counter).
    failure: why the server ended it.
    """

    __slots__ = (
        "_error", "_finish_reason", "_logprobs", "_on_cancel", "_on_end", "_read_to_end", "_tokens", "_waiter",
        "failure", "first_token", "generation", "last_token", "mailbox", "num_tokens", "record", "slot_given",
        "submitted",
    )  # fmt: skip

    def __init__(
        self,
        mailbox: Mailbox,
        record: Record | None,
        on_cancel: Callable[[Stream], None],
        on_end: Callable[[Stream], None],
    ):
        self.generation: Generation = None  # type: ignore[assignment] (set before `submit` returns the stream)
        self.mailbox, self.record = mailbox, record
        self.failure: str | None = None
        self.submitted = time.perf_counter()
        self.slot_given: float | None = None
        self.first_token: float | None = None
        self.last_token = self.submitted
        self.num_tokens = 0
        self._on_cancel, self._on_end = on_cancel, on_end
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: str | None = None
        self._error: str | None = None
        self._read_to_end = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether the whole output has arrived."""
        return self._finish_reason is not None

    def receive(self, news: News) -> None:
        """Take what a step brought; in the event loop."""
        if self._finish_reason is not None:
            return
        self._tokens += news.tokens
        self._logprobs += news.logprobs
        if news.finish_reason is not None:
            self._finish_reason, self._error = news.finish_reason, news.error
            self._on_end(self)
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        if not self._tokens and self._finish_reason is None:
            self._waiter = self.mailbox.loop.create_future()
            await self._waiter
        elif self._read_to_end:
            raise StopAsyncIteration
        piece = Piece(self._tokens, self._logprobs, self._finish_reason, self._error)
        self._tokens, self._logprobs = [], []
        self._read_to_end = piece.finish_reason is not None
        return piece

    def cancel(self) -> None:
        """End the request, unless it has finished. Does not wait."""
        if self._finish_reason is None:
            self._on_cancel(self)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
