"""The end of a run: its last step, its time limit, or a signal, agreed on by all processes.

All processes must stop at the same step, so they exchange what they know before every step: one small all-reduce on
the CPU, which no GPU waits for. It also sums the targets of the step, by which the loss is divided.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAVING = b"\ninterrupted: the step is finished and saved first (Ctrl-C again ends the run without saving)\n"


class Terminated(Exception):
    """A run ended by a signal. exit_code: as shells report a process that the signal ended."""

    def __init__(self, step: int, how_to_resume: str, number: int = signal.SIGTERM):
        super().__init__(f"terminated at step {step}; {how_to_resume}")
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Agreed:
    """The facts that all processes share before a step.

    num_targets: of the step, over all processes. terminate: whether any process received a signal. seconds: the time of
    the run by the clock of process 0.
    """

    num_targets: int
    terminate: bool
    seconds: float


class ProcessConsensus:
    """Exchanges what each process knows. With one process it returns what it is given."""

    def __init__(self) -> None:
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if self._several else None

    def reach(self, num_targets: int, terminate: bool, seconds: float) -> Agreed:
        """Combine the values of all processes, which all call this before every step."""
        if not self._several:
            return Agreed(num_targets, terminate, seconds)
        mine = [num_targets, terminate, seconds if dist.get_rank() == 0 else 0.0]
        total = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return Agreed(int(total[0]), bool(total[1]), float(total[2]))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. All processes call this at the same points."""
        return self.reach(0, flag, 0.0).terminate


class TerminationSignal:
    """A context in which SIGTERM and SIGINT (Ctrl-C) are recorded instead of ending the process.

    A second Ctrl-C is a KeyboardInterrupt. A signal that the process ignores stays ignored, as with nohup.

    number: the signal that was received first, None before. announces: whether a Ctrl-C is confirmed on standard error.
    """

    def __init__(self, *, announces: bool = False):
        self.number: int | None = None
        self._announces = announces
        self._before: dict[int, Any] = {}

    @property
    def received(self) -> bool:
        return self.number is not None

    def __enter__(self) -> TerminationSignal:
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # Python allows handlers in the main thread only; in others the caller handles signals
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self._announces:
            os.write(2, _SAVING)  # not print: the signal may have come in the middle of one
        self.number = self.number or number


class RunClock:
    """The time of a run against its limit. The time before a run was resumed counts too.

    seconds: the time that all processes agreed on before the current step.
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
        """Seconds of the run, by this process's clock."""
        return self._earlier + (0.0 if self._began is None else time.monotonic() - self._began)

    @property
    def fraction(self) -> float:
        """The share of the time limit that has passed; 0 without a limit."""
        return 0.0 if self._limit is None else min(1.0, self.seconds / self._limit)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the time limit, by this process's clock; None without a limit."""
        return None if self._limit is None else max(0.0, self._limit - self.read())

    def schedule(self, by_step: Callable[[int], float], max_steps: int) -> Callable[[int], float]:
        """A learning-rate schedule that follows the steps or the time, whichever has progressed further."""
        return lambda step: by_step(max(step, int(self.fraction * max_steps)))
