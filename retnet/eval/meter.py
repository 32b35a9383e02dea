"""Time and memory per token of a stream of any length, in fixed memory.

Tokens are counted in bins. When there are `BINS` of them, neighbours merge and the width doubles.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from retnet.system.memory import resident_bytes

BINS = 256


@dataclass(frozen=True)
class Bin:
    """Tokens [first, first + count): mean seconds per token, and the process's memory at the last one."""

    first: int
    count: int
    seconds_per_token: float
    memory_bytes: int


class StreamMeter:
    """Call `tick` after each token. The first token, which waits for the prefill, is in no bin."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds_to_first = float("nan")
        self._width = 1
        self._bins: list[Bin] = []
        self._first = 1
        self._began = self._bin_began = self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """From the first token to the last."""
        return self._last - self._began - self.seconds_to_first

    @property
    def bins(self) -> list[Bin]:
        """The full bins, oldest first."""
        return list(self._bins)

    def tick(self) -> None:
        """Count one token."""
        self.tokens += 1
        self._last = now = time.perf_counter()
        if self.tokens == 1:
            self._bin_began = now
            self.seconds_to_first = self._bin_began - self._began
        if self.tokens - self._first < self._width:
            return
        self._bins.append(Bin(self._first, self._width, (now - self._bin_began) / self._width, resident_bytes()))
        self._first, self._bin_began = self.tokens, now
        if len(self._bins) == BINS:
            self._bins = [_merge(a, b) for a, b in zip(self._bins[::2], self._bins[1::2], strict=True)]
            self._width *= 2


def _merge(a: Bin, b: Bin) -> Bin:
    count = a.count + b.count
    seconds = (a.seconds_per_token * a.count + b.seconds_per_token * b.count) / count
    return Bin(a.first, count, seconds, b.memory_bytes)
