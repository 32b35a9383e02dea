"""Progress of a run on the console: loss, bits per byte, tokens per second, MFU, memory, time left.

A terminal shows one line that is updated, and the validations above it; other outputs get one line per log entry.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retnet.system.durations import format_seconds
from retnet.system.progress import Progress
from retnet.system.sizes import format_bytes
from retnet.train.stopping import RunClock


class ProgressCallback(TrainerCallback):
    """Shows a run on a console. clock: of the run, which knows the time limit."""

    def __init__(self, console: Console, clock: RunClock):
        self._console, self._clock = console, clock
        self._bar: Progress | None = None
        self._began = 0.0
        self._first_step = 0
        self._warm_up = True
        self._notes: list[str] = []
        self._scored = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self._console.is_interactive:
            self._bar = Progress(self._console, self._what(state), state.max_steps, transient=False)
            self._update(state)
            self._bar.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._warm_up:  # the first step compiles, captures and allocates
            self._began, self._first_step = time.perf_counter(), state.global_step
            self._warm_up = False
        self._update(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._scored += 1
        if self._bar is not None:
            batches = len(kwargs["eval_dataloader"])
            self._bar.update(notes=[f"validating, batch {self._scored} of {batches}", *self._notes])
            if self._scored == batches:
                self._scored = 0

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._update(state)

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
            self._notes = _notes(logs)
            self._update(state)
            if self._bar is None:
                left = self._left(state)
                notes = [*self._notes, *([] if left is None else [f"{format_seconds(left)} left"])]
                self._print(f"{self._what(state)}: {', '.join(notes)}")
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
            self._bar.close()
            self._bar = None

    def _update(self, state: TrainerState) -> None:
        if self._bar is not None:
            done = max(state.global_step, self._clock.fraction * state.max_steps)
            self._bar.update(done, what=self._what(state), notes=self._notes, left=self._left(state))

    def _what(self, state: TrainerState) -> str:
        return f"step {state.global_step:,}/{state.max_steps:,}"

    def _left(self, state: TrainerState) -> float | None:
        """Seconds to the end, at the pace since the first step, validations and checkpoints included.

        Before the second step only the time limit is known, if there is one.
        """
        done = state.global_step - self._first_step
        pace = None if done < 1 else (time.perf_counter() - self._began) / done
        by_steps = None if pace is None else (state.max_steps - state.global_step) * pace
        return min((left for left in (by_steps, self._clock.seconds_left) if left is not None), default=None)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _notes(logs: dict[str, float]) -> list[str]:
    """The values of a log entry in words, the most important first."""
    bits = f" ({logs['bits_per_byte']:.3f} bits per byte)" if "bits_per_byte" in logs else ""
    notes = [f"loss {logs['loss']:.3f}{bits}"]
    if "tokens_per_second" in logs:
        notes.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "router_loss" in logs:
        notes.append(f"router loss {logs['router_loss']:.4f}")
    if "expert_peak" in logs:
        notes.append(f"busiest expert {logs['expert_peak']:.2f} times its share")
    if "tokens_per_second" in logs:
        notes += [f"MFU {logs['mfu']:.1%}", f"waiting for data {logs['data_wait']:.2%}"]
    return [*notes, format_bytes(logs["memory_gib"] * 2**30, 3)]
