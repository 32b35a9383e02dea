"""Progress of a run on the console: loss, bits per byte, tokens per second, MFU, memory, time left.

A terminal shows one line that is updated; other outputs get one line per log entry.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retnet.system.sizes import format_bytes


class ProgressCallback(TrainerCallback):
    """Shows a run on a console. max_minutes: the run's time limit, if it has one."""

    def __init__(self, console: Console, max_minutes: float | None = None):
        self._console = console
        self._max_seconds = None if max_minutes is None else 60 * max_minutes
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
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._show(state, logs)
        elif "eval_loss" in logs:
            self._print(
                f"step {state.global_step}: validation loss {logs['eval_loss']:.3f}, "
                f"perplexity {logs['eval_perplexity']:.2f}, {logs['eval_bits_per_byte']:.3f} bits per byte"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the terminal, also after an interruption, for which the Trainer has no event."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, state: TrainerState, logs: dict[str, float]) -> None:
        parts = [f"loss {logs['loss']:.3f} ({logs['bits_per_byte']:.3f} bits per byte)"]
        if "router_loss" in logs:
            parts.append(f"router loss {logs['router_loss']:.4f}")
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"MFU {logs['mfu']:.1%}")
            parts.append(f"waiting for data {logs['data_wait']:.2%}")
        parts.append(format_bytes(logs["memory_gib"] * 2**30, 3))
        status = ", ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        else:
            self._print(f"step {state.global_step}/{state.max_steps}: {status}, {self._left(state):.0f} s left")

    def _left(self, state: TrainerState) -> float:
        seconds = time.perf_counter() - self._began
        done = max(1, state.global_step - self._first_step)
        left = (state.max_steps - state.global_step) * seconds / done
        return left if self._max_seconds is None else max(0.0, min(left, self._max_seconds - seconds))

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
