"""The service: one engine on a thread of its own, and event loops that submit requests to it.

Commands (submit, cancel, call) wait in a queue and run between steps on the engine's thread. After each step, the new
tokens of all requests go to the event loop in one callback. A stream that is not read collects its tokens and hands
them over as one piece. Tokenising and JSON are left to the event loop; stop strings alone are decoded in the engine's
thread, because the state at the stop must be exact.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from retnet.data.tokenizer import Tokenizer
from retnet.serve.engine import Engine
from retnet.serve.http.errors import ApiError
from retnet.serve.http.settings import Settings
from retnet.serve.request import Generation, Refused, Request, Status, TokenLogprobs
from retnet.serve.snapshot import Snapshot

R = TypeVar("R")
MOST_FAILURES = 3  # steps that fail one after another before all requests are given up
log = logging.getLogger("retnet.serve")


@dataclass(slots=True)
class Piece:
    """What a stream got since its last piece. The last piece of a stream has a finish_reason."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None = None
    error: str | None = None


class _Mailbox:
    """What the engine's thread has for the streams of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._outbox: deque[list[tuple[Stream, Piece]]] = deque()
        self._scheduled = False

    def post(self, batch: list[tuple[Stream, Piece]]) -> None:
        """From the engine's thread. The loop that is behind gets several batches in one callback."""
        self._outbox.append(batch)
        if not self._scheduled:
            self._scheduled = True
            self.call(self._deliver)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed, and nobody waits in it
            log.debug("an event loop was closed while requests ran")

    def _deliver(self) -> None:
        self._scheduled = False  # before the outbox is emptied: what comes later schedules again
        while self._outbox:
            for stream, piece in self._outbox.popleft():
                stream._receive(piece)


class Stream:
    """The output of one request, for the event loop that submitted it."""

    __slots__ = ("_closed", "_mailbox", "_piece", "_service", "_waiter", "generation")

    def __init__(self, service: Service, mailbox: _Mailbox):
        self.generation: Generation = None  # type: ignore[assignment] (set before `submit` returns the stream)
        self._service, self._mailbox = service, mailbox
        self._piece: Piece | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False  # its last piece was received

    def _receive(self, piece: Piece) -> None:
        if self._closed:
            return
        if self._piece is None:
            self._piece = piece
        else:
            mine = self._piece
            mine.tokens += piece.tokens
            mine.logprobs += piece.logprobs
            mine.finish_reason, mine.error = piece.finish_reason, piece.error
        self._closed = piece.finish_reason is not None
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        if self._piece is None:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = self._mailbox.loop.create_future()
            await self._waiter
            assert self._piece is not None
        piece, self._piece = self._piece, None
        return piece

    def cancel(self) -> None:
        """End the request, unless it has finished. Does not wait."""
        if not self._closed:
            self._service._commands.put(lambda: self._service._cancel(self))

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class Service:
    """One engine behind event loops. `start` before the first request, `stop` at the end."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model_name: str, settings: Settings | None = None):
        self.engine, self.tokenizer, self.model_name = engine, tokenizer, model_name
        self.settings = settings or Settings()
        self.vocab_size: int = engine.model.config.vocab_size
        self.context_limit: int | None = engine.pool.max_tokens
        most = self.settings.max_waiting
        self._most_streams = engine.pool.num_slots + (4 * engine.pool.num_slots if most is None else most)
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[Generation, Stream] = {}
        self._mailboxes: dict[asyncio.AbstractEventLoop, _Mailbox] = {}
        self._thread: Thread | None = None
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Start the engine's thread, unless it runs."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="retnet engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the engine's thread after its step; unfinished requests are cancelled. Waits for it."""
        if self._thread is not None:
            self._commands.put(None)
            self._thread.join()
            self._thread = None

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    def prefix_group(self, key: str) -> str:
        """The group of requests that share cached prefixes with the requests of an API key."""
        return key if self.settings.prefix_per_key else ""

    async def submit(self, request: Request, after: Snapshot | None = None) -> Stream:
        """Queue a request. Raises ApiError: 429 if too many wait, 400 for what the engine cannot serve."""
        stream = Stream(self, self._mailbox())
        try:
            await self._command(lambda: self._submit(stream, request, after))
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream

    async def call(self, function: Callable[[Engine], R]) -> R:
        """The result of `function(engine)`, which runs between steps on the engine's thread."""
        return await self._command(lambda: function(self.engine))

    def _mailbox(self) -> _Mailbox:
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            for other in [other for other in self._mailboxes if other.is_closed()]:
                self._mailboxes.pop(other, None)
            mailbox = self._mailboxes[loop] = _Mailbox(loop)
        return mailbox

    async def _command(self, do: Callable[[], R]) -> R:
        if not self.alive:
            raise ApiError(503, "the engine does not run")
        mailbox = self._mailbox()
        result: asyncio.Future[R] = mailbox.loop.create_future()

        def run() -> None:
            try:
                value, error = do(), None
            except Exception as raised:
                value, error = None, raised
            mailbox.call(_settle, result, value, error)

        self._commands.put(run)
        return await result

    def _submit(self, stream: Stream, request: Request, after: Snapshot | None) -> None:
        if len(self._streams) >= self._most_streams:
            raise ApiError(
                429, f"{len(self._streams)} requests run or wait; try again later", headers={"Retry-After": "1"}
            )
        try:
            stream.generation = self.engine.submit(request, after)
        except Refused as error:
            raise ApiError(400, str(error)) from error
        self._streams[stream.generation] = stream

    def _cancel(self, stream: Stream) -> None:
        if stream.generation in self._streams:
            self.engine.cancel(stream.generation)

    def _run(self) -> None:
        failures = 0
        while True:
            while not self._streams or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return self._end()
                command()
                if not self._streams:
                    continue
            try:
                new = self.engine.step()
                failures = 0
            except Exception:
                log.exception("a step of the engine failed")
                new, failures = [], failures + 1
                if failures >= MOST_FAILURES:
                    for generation in list(self._streams):
                        self.engine.cancel(generation)
            self._publish(new)

    def _end(self) -> None:
        for generation in list(self._streams):
            self.engine.cancel(generation)
        self._publish([])

    def _publish(self, new: list[tuple[Generation, list[int]]]) -> None:
        """Hand the new tokens of a step, and the ends of requests, to their event loops."""
        streams = self._streams
        batches: dict[_Mailbox, list[tuple[Stream, Piece]]] = {}
        for generation, tokens in new:
            stream = streams.get(generation)
            if stream is None:
                continue
            logprobs = generation.logprobs[-len(tokens) :] if generation.logprobs else []
            finished = generation.status is Status.FINISHED
            piece = Piece(tokens, logprobs, generation.finish_reason if finished else None, generation.error)
            batches.setdefault(stream._mailbox, []).append((stream, piece))
            if finished:
                del streams[generation]
        for generation in [g for g in streams if g.status is Status.FINISHED]:
            stream = streams.pop(generation)
            piece = Piece([], [], generation.finish_reason, generation.error)
            batches.setdefault(stream._mailbox, []).append((stream, piece))
        for mailbox, batch in batches.items():
            mailbox.post(batch)


def _settle(result: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if result.done():  # its caller has gone
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)
