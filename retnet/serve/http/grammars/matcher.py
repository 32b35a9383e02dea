"""Matchers of llguidance's grammars for the engine.

The mask of the next token is computed on a thread of a pool, while the model computes logits; `fill` waits for it. So a
mask that takes too long costs the engine `STEP_SECONDS` once and fails its own request, and one that overflows the
stack does so later than in the trial (`grammar_probe.py`), because these threads have a larger one.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import llguidance
import torch
from torch import Tensor

from retnet.serve.http.grammars.probe import COMPILE_STACK, short_error

STEP_SECONDS = 0.25  # CPU time of one mask
STEP_WALL = 1.0  # seconds that the engine waits for one mask at most, where others take the CPU
TOTAL_SECONDS, SECONDS_PER_TOKEN = 1.0, 0.005  # CPU time of all masks of an output
MOST_STUCK = 8  # masks that nobody waits for, but that are being computed


class GrammarError(RuntimeError):
    """A grammar cannot go on with an output; the message says why."""


class Job:
    """A computation on a thread of the pool. `done` is a lock that the thread releases at the end."""

    __slots__ = ("abandoned", "clock", "done", "run", "started")

    def __init__(self, run: Callable[[], None]):
        self.run, self.abandoned = run, False
        self.clock: Callable[[], float] | None = None  # the CPU time of the thread that computes it, if there is one
        self.started = 0.0
        self.done = _thread.allocate_lock()
        self.done.acquire()

    def finished(self, cpu: float, wall: float) -> bool:
        """Wait for its end, while it takes less than this CPU time and this wall time."""
        until = time.monotonic() + wall
        while not self.done.acquire(timeout=cpu / 8):
            taken = 0.0 if self.clock is None else self.clock() - self.started
            if taken >= cpu or time.monotonic() >= until:
                return self.done.acquire(blocking=False)
        return True


class MaskThreads:
    """Threads with a large stack. One that is stuck in a computation is replaced, `MOST_STUCK` at a time."""

    def __init__(self, count: int):
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._stuck = 0
        self._count = count
        for _ in range(count):
            self._add()

    def start(self, run: Callable[[], None]) -> Job:
        job = Job(run)
        self._queue.put(job)
        return job

    @property
    def overloaded(self) -> bool:
        return self._stuck >= MOST_STUCK

    def abandon(self, job: Job) -> None:
        """Nobody waits for this computation, and another thread takes the place of the one that it occupies."""
        with self._lock:
            if not job.done.locked():
                return
            job.abandoned = True
            self._stuck += 1
        self._add()

    def close(self) -> None:
        for _ in range(self._count):
            self._queue.put(None)

    def _add(self) -> None:
        before = threading.stack_size(COMPILE_STACK)
        try:
            threading.Thread(target=self._work, name="retnet masks", daemon=True).start()
        finally:
            threading.stack_size(before)

    def _work(self) -> None:
        clock = _clock_of_this_thread()
        while (job := self._queue.get()) is not None:
            job.started, job.clock = clock(), clock
            job.run()
            with self._lock:
                job.done.release()
                if job.abandoned:
                    self._stuck -= 1
                    return


def _clock_of_this_thread() -> Callable[[], float]:
    """Its CPU time, for other threads to read while it runs; wall time where the system does not tell."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)


class GuidedGrammar:
    """A compiled grammar (`retnet.serve.grammar.Grammar`).

    beginning: a matcher that has read nothing; copies of it share its lexer. text: which tokens have text, as a mask.
    ends: tokens that end an output. failed: called when an output fails, as its lexer may be full.
    """

    def __init__(
        self,
        beginning: llguidance.LLMatcher,
        threads: MaskThreads,
        text: Tensor,
        ends: Sequence[int],
        failed: Callable[[], None] = lambda: None,
    ):
        self._beginning, self.threads, self.ends, self.failed = beginning, threads, tuple(ends), failed
        self.text = text
        self.end_bits = bits_of(ends, len(text))
        self.text_or_end = text | self.end_bits

    def matcher(self) -> GuidedMatcher:
        if self.threads.overloaded:
            raise GrammarError("too many masks of other grammars take too long; try again later")
        return GuidedMatcher(self, self._beginning.deep_copy())


class GuidedMatcher:
    """A grammar and the tokens of one output so far (`retnet.serve.grammar.Matcher`).

    Its methods raise GrammarError where the grammar cannot go on; then it is not used again.
    """

    def __init__(self, grammar: GuidedGrammar, inner: llguidance.LLMatcher):
        self._grammar, self._inner = grammar, inner
        self._mask = torch.empty_like(grammar.end_bits)
        self._accepted = 0
        self._spent = 0.0  # CPU time of its masks
        self._error: str | None = None
        self.ended = False
        self._job = grammar.threads.start(self._compute)

    def fill(self, mask: Tensor) -> None:
        self._wait()
        mask.copy_(self._mask)

    def accept(self, token: int) -> bool:
        self._wait()
        word, bit = divmod(token, 32)
        if not 0 <= word < len(self._mask) or not int(self._mask[word]) >> bit & 1:
            return False
        if not self._inner.consume_token(token):
            self._fail(short_error(self._inner.get_error()))
        self._accepted += 1
        self._advance(token in self._grammar.ends)
        return True

    def rollback(self, count: int) -> None:
        if count == 0:
            return
        if not 0 < count <= self._accepted:
            raise ValueError(f"count is {count}; accepted: 0 to {self._accepted}, the tokens of the output")
        self._wait()
        if not self._inner.rollback(count):
            self._fail(short_error(self._inner.get_error()))
        self._accepted -= count
        self._advance(False)

    def _advance(self, at_end: bool) -> None:
        """Begin with the mask after the tokens so far. at_end: the last of them is an end token."""
        self.ended = at_end or self._inner.is_stopped()
        if self._inner.is_error():
            self._fail(short_error(self._inner.get_error()))
        if self.ended:
            self._mask.copy_(self._grammar.end_bits)
        else:
            self._job = self._grammar.threads.start(self._compute)

    def _compute(self) -> None:
        """On a thread of the pool: the next mask."""
        mask, inner, before = self._mask, self._inner, time.thread_time()
        try:
            inner.unsafe_compute_mask_ptr(mask.data_ptr(), mask.numel() * mask.element_size())
            if inner.is_error():
                self._error = short_error(inner.get_error())
        except Exception as error:
            self._error = str(error)
        self._spent += time.thread_time() - before

    def _wait(self) -> None:
        """Wait for the mask."""
        if self._error is not None:
            raise GrammarError(self._error)
        job = self._job
        if job is None:
            return
        if not job.finished(STEP_SECONDS, STEP_WALL):
            self._grammar.threads.abandon(job)
            self._fail(f"the mask of one token takes more than {STEP_SECONDS} s")
        self._job = None
        if self._error is not None:
            self._fail(self._error)
        if self._spent > TOTAL_SECONDS + SECONDS_PER_TOKEN * self._accepted:
            self._fail(f"its masks took {self._spent:.1f} s for {self._accepted} tokens")
        # A grammar may name tokens by their numbers: the end of an output is allowed where it may end, and no other.
        self._mask &= self._grammar.text_or_end if self._inner.is_accepting() else self._grammar.text
        if not self._mask.any():
            self._fail("no token of this tokenizer fits")

    def _fail(self, why: str) -> None:
        self._error = f"the grammar cannot go on after {self._accepted} tokens of the output: {why}"
        self._grammar.failed()
        raise GrammarError(self._error)


def bits_of(tokens: Sequence[int], words: int) -> Tensor:
    """A mask with these tokens alone, int32 [words]."""
    mask = torch.zeros(words * 32, dtype=torch.bool)
    mask[list(tokens)] = True
    return packed(mask)


def packed(allowed: Tensor) -> Tensor:
    """Booleans [32 words] as the bits of int32 [words]; token t is bit t % 32 of word t // 32."""
    weights = 1 << torch.arange(32, dtype=torch.int64)
    return (allowed.view(-1, 32).long() * weights).sum(1).to(torch.int32)
