"""Turns: calls of several threads and of callbacks, one at a time.

The outer lock lets one thread in; it may enter again, because `decode` is called inside a step and calls back. The
inner lock is held while states and tokens may disagree. Each `with` and its body are one line on purpose: an exception
from a debugger or a signal then comes before the lock is taken or is seen by it, and no lock stays taken.

Python's locks are not fair: a thread that steps in a loop would take the lock again before any other has woken up. So a
thread that finds others waiting sleeps for a moment first.
"""

import time
from collections.abc import Callable
from threading import Lock, RLock, get_ident
from typing import TypeVar

R = TypeVar("R")
WAKE_UP_SECONDS = 1e-4  # a thread takes about half of it to wake up


class Turns:
    """The turns of one engine's callers."""

    def __init__(self) -> None:
        self._calls, self._states = RLock(), Lock()
        self._waiting: dict[int, None] = {}  # threads
        self._served = 0  # the thread that was let in last

    @property
    def inside_step(self) -> bool:
        """Whether a call works on states; for the caller whose turn it is, whether it calls from inside its own."""
        return self._states.locked()

    def take(self, do: Callable[[], R]) -> R:
        """Run `do` when it is this thread's turn."""
        thread = get_ident()
        if self._waiting and not (self._served == thread and self.inside_step):
            time.sleep(WAKE_UP_SECONDS)
        self._waiting[thread] = None
        with self._calls: return self._serve(thread, do)  # fmt: skip # noqa: E701

    def work(self, do: Callable[[], R]) -> R:
        """Within a turn: run `do`, which works on states."""
        with self._states: return do()  # fmt: skip # noqa: E701

    def _serve(self, thread: int, do: Callable[[], R]) -> R:
        self._waiting.pop(thread, None)
        self._served = thread
        return do()
