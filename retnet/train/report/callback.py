"""The callback that writes a run's report: at the start, while training runs, and at the end, whatever ends it.

A report is written at most every `WRITE_SECONDS`, and less often where writing takes long, so that it costs a run at
most a fiftieth of its time. Each time the whole file is replaced at once: after a crash it is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retnet.system.files import written_whole
from retnet.train.report.page import FINISHED, RUNNING, STOPPED, Page, Table, render
from retnet.train.stopping import RunClock, Terminated

REPORT_FILE = "report.html"
WRITE_SECONDS = 5.0
MOST_OF_TIME = 0.02


@dataclass(frozen=True)
class Subject:
    """What a report is about: the parts of `Page` that a run does not change."""

    title: str
    tokens_per_step: int
    tables: Mapping[str, Table]
    settings: Mapping[str, Any]


class Report(TrainerCallback):
    """Writes the report of a run to `path`. Only the first process of a run has one.

    clock: of the run. warn: gets one sentence if the file cannot be written; the run goes on without it.
    """

    def __init__(self, path: Path, subject: Subject, clock: RunClock, warn: Callable[[str], None]):
        self.path, self._subject, self._clock, self._warn = path, subject, clock, warn
        self._state: TrainerState | None = None
        self._next = 0.0
        self._failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._state = state
        self._write(RUNNING, "")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._state = state
        if time.monotonic() >= self._next:
            self._write(RUNNING, "")

    def finish(self, samples: Sequence[tuple[str, str]]) -> None:
        """The last report of a run that came to its end."""
        self._write(FINISHED, "", samples)

    def stop(self, error: BaseException) -> None:
        """The last report of a run that an error or a signal ended."""
        said = str(error) if isinstance(error, Terminated) else f"{type(error).__name__}: {error}".rstrip(": ")
        self._write(STOPPED, said)

    def _write(self, status: str, note: str, samples: Sequence[tuple[str, str]] = ()) -> None:
        state, subject = self._state, self._subject
        if state is None:  # the run ended before its first step
            return
        began = time.monotonic()
        page = Page(
            title=subject.title,
            status=status,
            note=note,
            step=state.global_step,
            max_steps=state.max_steps,
            tokens_per_step=subject.tokens_per_step,
            seconds=self._clock.read(),
            log=state.log_history,
            tables=subject.tables,
            settings=subject.settings,
            samples=samples,
        )
        try:
            with written_whole(self.path) as file:
                file.write(render(page))
        except OSError as error:
            if not self._failed:
                self._warn(f"the report is not written: {error}")
            self._failed = True
        now = time.monotonic()
        self._next = now + max(WRITE_SECONDS, (now - began) / MOST_OF_TIME)
