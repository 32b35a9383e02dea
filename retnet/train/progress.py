"""What a user sees while a model trains: loss, bits per byte, tokens a second, time left.

On a terminal one line that changes, elsewhere a line at each log. A loss that is not finite ends the run at once.
"""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressCallback(TrainerCallback):
    """Shows a run on a console.

    tokens_per_step: over all processes and accumulation steps.
    """

    def __init__(self, console: Console, tokens_per_step: int):
        self._console = console
        self._tokens_per_step = tokens_per_step
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, status="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        for name in ("loss", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise ValueError(
                    f"{name} is {logs[name]} at step {state.global_step}; a lower learning_rate "
                    f"(now {args.learning_rate:g}) or max_grad_norm (now {args.max_grad_norm:g}) usually helps"
                )
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._show(state, logs["loss"])
        elif "eval_loss" in logs:
            self._print(f"step {state.global_step}: validation {_describe(logs['eval_loss'])}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; the Trainer does not say when a run was interrupted."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, state: TrainerState, loss: float) -> None:
        seconds = time.perf_counter() - self._began
        done = state.global_step - self._first_step
        rate = done * self._tokens_per_step / seconds
        status = f"{_describe(loss)}, {rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        else:
            left = (state.max_steps - state.global_step) * seconds / max(done, 1)
            self._print(f"step {state.global_step}/{state.max_steps}: {status}, {left:.0f} s left")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _describe(loss: float) -> str:
    return f"loss {loss:.3f} ({loss / math.log(2):.3f} bits per byte)"
