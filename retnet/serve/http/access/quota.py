"""Quotas of callers: requests per minute, and requests at a time."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from retnet.serve.http.errors import ApiError

MOST_CALLERS = 10_000  # that are remembered; the one that has been away longest is forgotten first


@dataclass(slots=True)
class _Caller:
    tokens: float  # of the token bucket
    filled: float  # when they were counted
    running: int = 0


class Quotas:
    """Limits per caller, which is an API key's id, or a client's address without keys.

    rate: requests per minute (None: any number). A token bucket allows a burst of 10 seconds' worth, or of one request.
    concurrency: requests at a time (None: any number).
    """

    def __init__(self, rate: float | None, concurrency: int | None, clock: Callable[[], float] = time.monotonic):
        self.rate, self.concurrency, self._clock = rate, concurrency, clock
        self._burst = max(1.0, (rate or 0) / 6)
        self._callers: OrderedDict[str, _Caller] = OrderedDict()

    def enter(self, caller: str) -> None:
        """Count a request that begins. Raises ApiError 429 with Retry-After if it is one too many."""
        if self.rate is None and self.concurrency is None:
            return
        now = self._clock()
        state = self._callers.get(caller)
        if state is None:
            state = self._callers[caller] = _Caller(self._burst, now)
            self._forget()
        self._callers.move_to_end(caller)
        if self.concurrency is not None and state.running >= self.concurrency:
            raise _too_many(f"{state.running} requests of this caller run; accepted at a time: {self.concurrency}", 1)
        if self.rate is not None:
            state.tokens = min(self._burst, state.tokens + (now - state.filled) * self.rate / 60)
            state.filled = now
            if state.tokens < 1:
                wait = math.ceil((1 - state.tokens) * 60 / self.rate)
                raise _too_many(f"more than {self.rate:g} requests per minute of this caller", wait)
            state.tokens -= 1
        state.running += 1

    @contextmanager
    def place(self, caller: str) -> Iterator[None]:
        """Count a request while it runs. Raises ApiError as `enter`."""
        self.enter(caller)
        try:
            yield
        finally:
            state = self._callers.get(caller)
            if state is not None:
                state.running -= 1

    def _forget(self) -> None:
        while len(self._callers) > MOST_CALLERS:
            idle = next((caller for caller, state in self._callers.items() if not state.running), None)
            if idle is None:
                return
            del self._callers[idle]


def _too_many(message: str, wait: int) -> ApiError:
    return ApiError(429, f"{message}; retry after {wait} s", headers={"Retry-After": str(wait)})
