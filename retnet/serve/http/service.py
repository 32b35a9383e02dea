"""The service: one engine on a thread of its own, and event loops that submit requests to it.

Commands (submit, cancel, call) wait in a queue and run between steps, in the engine's thread. So a request that is
cancelled while it ends has ended once, there. Tokenising and JSON are left to the event loop; stop strings alone are
decoded in the engine's thread, because the state at the stop must be exact.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from retnet.data.tokenizer import Tokenizer
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.http.access.record import RECORD
from retnet.serve.http.errors import ApiError
from retnet.serve.http.settings import Settings
from retnet.serve.http.stream import Mailbox, News, Piece, Stream
from retnet.serve.request import Generation, Refused, Request, Status, TokenLogprobs
from retnet.serve.stats import EngineStats

__all__ = ["Piece", "Service", "Stream"]

R = TypeVar("R")
MOST_FAILURES = 3  # steps that fail one after another before all requests are given up
WAITING_PER_SLOT = 4  # requests that may wait, by default
STATS_SECONDS = 0.25  # between two looks at the engine's counts while it is busy
STOP_SECONDS = 30.0  # for the step that runs when the service is stopped
log = logging.getLogger("retnet.serve")


class _Command(Generic[R]):
    """A function for the engine's thread, and the future of the event loop that waits for its result."""

    __slots__ = ("_do", "_mailbox", "result")

    def __init__(self, do: Callable[[], R], mailbox: Mailbox):
        self._do, self._mailbox = do, mailbox
        self.result: asyncio.Future[R] = mailbox.loop.create_future()

    def run(self) -> None:
        try:
            self._mailbox.call(_settle, self.result, self._do(), None)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        self._mailbox.call(_settle, self.result, None, error)


class _Cancel:
    """The end of a request whose stream was left."""

    __slots__ = ("_service", "_stream")

    def __init__(self, service: Service, stream: Stream):
        self._service, self._stream = service, stream

    def run(self) -> None:
        self._service._cancel(self._stream)

    def fail(self, error: Exception) -> None:
        """All requests have ended."""


class Service:
    """One engine behind event loops. `start` before the first request, `stop` at the end.

    states: learned initial states by the name of the model in requests that start from them, which may be model_name.
    settings: None for those of a server by default. on_failure: called in the engine's thread if that ends by an error.

    stats: the engine's counts, at most STATS_SECONDS old. failure: the error that ended the engine's thread.
    draining: whether the server is about to end, and takes no more requests. num_exchanges: HTTP requests that may
    change something and are being served.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model_name: str,
        settings: Settings | None = None,
        states: Mapping[str, Snapshot] | None = None,
    ):
        self.engine, self.tokenizer, self.model_name = engine, tokenizer, model_name
        self.settings, self.states = settings or Settings(), dict(states or {})
        self.vocab_size: int = engine.model.config.vocab_size
        self.context_limit: int | None = engine.pool.max_tokens
        most_waiting = self.settings.max_waiting
        if most_waiting is None:
            most_waiting = WAITING_PER_SLOT * engine.pool.num_slots
        self.most_streams = engine.pool.num_slots + most_waiting
        self.stats: EngineStats = engine.stats()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], object] = lambda: None
        self.observers: list[Callable[[Stream], None]] = []  # told of every stream that ended, in its event loop
        self.draining = False
        self.num_exchanges = 0
        self._commands: SimpleQueue[_Command | _Cancel | None] = SimpleQueue()
        self._streams: dict[Generation, Stream] = {}
        self._queued: deque[Stream] = deque()  # those without a slot, in the order of arrival, and some that have ended
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._thread: Thread | None = None
        self._held: dict[Mailbox, list[News]] = {}  # what the last step brought, and no event loop knows yet
        self._stats_due = 0.0
        engine.on_launch(self._post_held)
        self._busy_since: float | None = None

    def start(self) -> None:
        """Start the engine's thread, unless it runs."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="retnet engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the engine's thread after its step; unfinished requests are cancelled. Waits for it."""
        if self._thread is not None:
            self._commands.put(None)
            self._thread.join(STOP_SECONDS)
            self._thread = None

    @property
    def model_names(self) -> list[str]:
        """The names that a request may give as its model."""
        return list(dict.fromkeys((self.model_name, *self.states)))

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    @property
    def num_streams(self) -> int:
        """Requests that run or wait."""
        return len(self._streams)

    @property
    def step_seconds(self) -> float:
        """How long the current step of the engine takes already; 0 if it is idle."""
        began = self._busy_since
        return 0.0 if began is None else time.perf_counter() - began

    def prefix_group(self, key: str) -> str:
        """The group of requests that share cached prefixes with the requests of an API key."""
        return key if self.settings.prefix_per_key else ""

    async def submit(self, request: Request, after: Snapshot | None = None) -> Stream:
        """Queue a request. Raises ApiError: 429 if too many wait, 400 for what the engine cannot serve."""
        stream = Stream(self._mailbox(), RECORD.get(), self._cancel_soon, self._on_end)
        if self.settings.log_prompts and stream.record is not None:
            stream.record.prompts.append(self.tokenizer.decode(request.prompt))
        try:
            await self._wait_for(lambda: self._submit(stream, request, after))
        except asyncio.CancelledError:
            self._cancel_soon(stream)
            raise
        return stream

    async def call(self, function: Callable[[Engine], R]) -> R:
        """The result of `function(engine)`, which runs between steps on the engine's thread."""
        return await self._wait_for(lambda: function(self.engine))

    async def end_all(self, reason: str) -> None:
        """End all requests: those that decode and keep their state as if they had reached their last token, so that
        another server can continue them, and the others with an error."""
        await self._wait_for(lambda: self._end_all(reason, keep=True))

    def _mailbox(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            for other in [other for other in self._mailboxes if other.is_closed()]:
                self._mailboxes.pop(other, None)
            mailbox = self._mailboxes[loop] = Mailbox(loop)
        return mailbox

    async def _wait_for(self, do: Callable[[], R]) -> R:
        command = _Command(do, self._mailbox())
        self._commands.put(command)
        if not self.alive:  # looked at after `put`: a thread that ends later fails the commands that it finds
            command.result.cancel()
            raise ApiError(503, "the engine does not run")
        return await command.result

    def _cancel_soon(self, stream: Stream) -> None:
        self._commands.put(_Cancel(self, stream))

    def _on_end(self, stream: Stream) -> None:
        """In the event loop: the whole output of a stream has arrived."""
        for observe in self.observers:
            observe(stream)

    # In the engine's thread

    def _submit(self, stream: Stream, request: Request, after: Snapshot | None) -> None:
        count = len(self._streams)
        if count >= self.most_streams:
            message = f"{count} requests run or wait, as many as this server takes; retry after 1 s"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        try:
            stream.generation = self.engine.submit(request, after)
        except Refused as error:
            raise ApiError(400, str(error)) from error
        self._streams[stream.generation] = stream
        self._queued.append(stream)

    def _cancel(self, stream: Stream) -> None:
        if stream.generation in self._streams:
            self.engine.cancel(stream.generation)

    def _end_all(self, reason: str, keep: bool) -> None:
        for generation, stream in list(self._streams.items()):
            if keep and generation.request.keep_state and generation.status is Status.DECODING:
                self.engine.cut(generation)
            else:
                stream.failure = reason
                self.engine.cancel(generation)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self.failure = error
            log.critical("the engine's thread ended", exc_info=error, extra={"shows_message": True})
        self._post_held()
        reason = "the server is shutting down" if self.failure is None else "the engine does not run"
        for stream in self._streams.values():
            stream.mailbox.post([News(stream, [], [], "failed", reason)])
        self._streams.clear()
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command.fail(ApiError(503, reason))
        if self.failure is not None:
            self.on_failure()

    def _serve(self) -> None:
        failures = 0
        while True:
            while not self._streams or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                self._post_held()
                command.run()
            self._busy_since = time.perf_counter()
            new = []
            try:
                new = self.engine.step()
                failures = 0
            except Exception as error:
                log.error("a step of the engine failed", exc_info=error, extra={"shows_message": True})
                failures += 1
                if failures >= MOST_FAILURES:
                    self._end_all(f"the engine failed: {type(error).__name__}", keep=False)
            self._post_held()
            self._publish(new)
            self._busy_since = None

    def _publish(self, new: list[tuple[Generation, list[int]]]) -> None:
        """Hand the new tokens of a step, and the ends of requests, to their event loops."""
        now = time.perf_counter()
        streams, queued = self._streams, self._queued
        batches: dict[Mailbox, list[News]] = {}
        while queued and queued[0].generation.status is not Status.WAITING:
            queued.popleft().slot_given = now
        for generation, tokens in new:
            stream = streams.get(generation)
            if stream is None:
                continue
            if stream.first_token is None:
                stream.first_token = now
            stream.last_token = now
            stream.num_tokens += len(tokens)
            if generation.status is not Status.FINISHED:
                news = News(stream, tokens, _logprobs(generation, tokens), None, None)
                batches.setdefault(stream.mailbox, []).append(news)
        ended = [generation for generation in streams if generation.status is Status.FINISHED]
        last_tokens = dict(new) if ended else {}
        for generation in ended:
            stream, tokens = streams.pop(generation), last_tokens.get(generation, [])
            error = stream.failure or generation.error
            news = News(stream, tokens, _logprobs(generation, tokens), generation.finish_reason, error)
            batches.setdefault(stream.mailbox, []).append(news)
        if now >= self._stats_due or not streams:  # before a client can see that its request has ended
            self._look()
        self._held = batches
        if not streams or len(new) < len(streams) + len(ended):  # no step follows, or one that reads prompts first
            self._post_held()

    def _post_held(self) -> None:
        """Wake the event loops up. While all requests decode, that waits until the next step is launched: woken before,
        a loop would compete with the launch for Python's lock."""
        held, self._held = self._held, {}
        for mailbox, batch in held.items():
            mailbox.post(batch)

    def _look(self) -> None:
        self.stats = self.engine.stats()
        self._stats_due = time.perf_counter() + STATS_SECONDS


def _logprobs(generation: Generation, tokens: list[int]) -> list[TokenLogprobs]:
    """The log-probabilities of the last tokens of a request, if it asked for them."""
    return generation.logprobs[-len(tokens) :] if tokens and generation.logprobs else []


def _settle(result: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if result.done():  # its caller has gone
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)
