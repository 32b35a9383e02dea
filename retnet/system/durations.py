"""Seconds in words, and the rate of a job with the time that it has left."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

WINDOW = 30.0  # seconds that a rate looks back
LEAST = 3  # samples that a rate looks back at least, however long ago


def format_seconds(seconds: float) -> str:
    """4000 -> '1 h 06 min', 75 -> '1 min 15 s', 4.2 -> '4 s'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


class Rate:
    """Units of work per second over the last `WINDOW` seconds, from (time, units done) samples.

    The first sample is where the job begins: work that was done before it, as by an interrupted run, does not count.
    """

    def __init__(self, now: float, done: float = 0.0):
        self._samples = deque([(now, done)])

    def add(self, now: float, done: float) -> None:
        """A later sample."""
        samples = self._samples
        samples.append((now, done))
        while len(samples) > LEAST and now - samples[1][0] >= WINDOW:
            samples.popleft()

    def per_second(self, now: float) -> float | None:
        """The rate at a moment, which falls while no work is reported; None before any was done.

        The time since the last sample counts only as far as it exceeds the longest gap between samples, so that the
        rate of a job that reports seldom stands still between two reports.
        """
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        times = [time for time, _ in self._samples]
        longest = max((b - a for a, b in pairwise(times)), default=0.0)
        seconds = max(end, now - longest) - begin
        return (last - first) / seconds if last > first and seconds > 0 else None

    def seconds_left(self, now: float, total: float | None) -> float | None:
        """Seconds until `total` units are done; None while the rate or the total is unknown."""
        rate = self.per_second(now)
        return None if rate is None or total is None else max(0.0, total - self._samples[-1][1]) / rate
