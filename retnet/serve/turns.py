"""Turns: calls of several threads and of callbacks, one at a time.

The outer lock lets one thread in; it may enter again, because `decode` is called inside a step and calls back. The
inner lock is held while states and tokens may disagree. Each `with` and its body are one line on purpose: an exception
from a debugger or a signal then comes before the lock is taken or is seen by it, and no lock stays taken.
"""

from collections.abc import Callable
from threading import Lock, RLock
from typing import TypeVar

R = TypeVar("R")


class Turns:
    """The turns of one engine's callers."""

    def __init__(self) -> None:
        self._calls, self._states = RLock(), Lock()

    @property
    def inside_step(self) -> bool:
        """Whether a call works on states; for the caller whose turn it is, whether it calls from inside its own."""
        return self._states.locked()

    def take(self, do: Callable[[], R]) -> R:
        """Run `do` when it is this thread's turn."""
        with self._calls: return do()  # fmt: skip # noqa: E701

    def work(self, do: Callable[[], R]) -> R:
        """Within a turn: run `do`, which works on states."""
        with self._states: return do()  # fmt: skip # noqa: E701
