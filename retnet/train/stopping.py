"""When a run ends: its last step, its last minute, or a SIGTERM; and the schedule that follows from it.

All processes have to stop at the same step, so they agree on the host before every step: one small sum over a group of
its own on the CPU, which no GPU waits for. It also counts the tokens of the step, by which the loss is weighted.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that the signal ended


class Terminated(Exception):
    """A run ended by SIGTERM. saved: the checkpoint to resume from, in words."""

    def __init__(self, step: int, saved: str):
        super().__init__(f"terminated at step {step}; {saved}")


@dataclass(frozen=True)
class Agreed:
    """What all processes know before a step: its targets on all of them, SIGTERM on any, seconds by process 0."""

    num_targets: int
    terminate: bool
    seconds: float


class ProcessConsensus:
    """The sum over processes of what each knows; nothing but a copy for one process."""

    def __init__(self) -> None:
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if self._several else None

    def reach(self, num_targets: int, terminate: bool, seconds: float) -> Agreed:
        """All processes call this before every step."""
        if not self._several:
            return Agreed(num_targets, terminate, seconds)
        mine = [num_targets, terminate, seconds if dist.get_rank() == 0 else 0.0]
        total = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return Agreed(int(total[0]), bool(total[1]), float(total[2]))

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all call this at the same places."""
        return self.reach(0, flag, 0.0).terminate


class TerminationSignal:
    """Remembers a SIGTERM while it is entered, in the main thread; elsewhere Python allows no handler."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> TerminationSignal:
        try:
            self._before = signal.signal(signal.SIGTERM, self._remember)
        except ValueError:  # not the main thread: whoever runs us there deals with signals
            self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class RunClock:
    """How far a run is: steps over max_steps, or with a limit its minutes, whichever is further.

    The minutes of earlier parts of a resumed run count too. All processes hold the same value: `seconds` is what they
    agreed on.
    """

    def __init__(self, max_minutes: float | None):
        self._limit = None if max_minutes is None else 60 * max_minutes
        self._earlier = 0.0
        self._began: float | None = None
        self.seconds = 0.0

    def start(self, earlier_seconds: float) -> None:
        self._earlier, self._began = earlier_seconds, time.monotonic()
        self.seconds = earlier_seconds

    def read(self) -> float:
        """Seconds of the run by this process's clock."""
        return self._earlier + (0.0 if self._began is None else time.monotonic() - self._began)

    @property
    def fraction(self) -> float:
        """Of the time allowed; 0 without a limit."""
        return 0.0 if self._limit is None else min(1.0, self.seconds / self._limit)

    def schedule(self, by_step: Callable[[int], float], max_steps: int) -> Callable[[int], float]:
        """A schedule of the learning rate that is through when the time is: of step or time, the further one counts."""
        return lambda step: by_step(max(step, int(self.fraction * max_steps)))
