"""The progress of a run: the time left, the lines of a log, the bar of a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from retnet.train import progress
from retnet.train.progress import ProgressCallback
from retnet.train.stopping import RunClock

LOGS = {"loss": 2.0, "bits_per_byte": 1.5, "tokens_per_second": 1234.5, "mfu": 0.1, "data_wait": 0.0, "memory_gib": 1.0}


class Clock(RunClock):
    """A clock that a test sets."""

    now = 0.0

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock(None)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    return clock


def state_at(step: int, max_steps: int = 40) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=True)


def left(clock: Clock, *, first: int = 0, step: int = 11, compiles: float = 100.0) -> float | None:
    """The time left after steps of 2 seconds; the first one, which compiles, takes longer."""
    callback = ProgressCallback(Console(quiet=True), clock)
    callback.on_train_begin(None, state_at(first), None)
    for number in range(first + 1, step + 1):
        clock.now += compiles if number == first + 1 else 2.0
        callback.on_step_end(None, state_at(number), None)
    return callback._left(state_at(step))


def test_the_time_left_is_that_of_the_remaining_steps_at_the_pace_since_the_first(clock):
    assert left(clock) == pytest.approx(58.0)


def test_a_resumed_run_counts_only_its_own_steps(clock):
    assert left(clock, first=30, step=35) == pytest.approx(10.0)


def test_the_time_left_is_unknown_before_the_second_step(clock):
    assert left(clock, step=1) is None


@pytest.mark.parametrize(("limit", "expected"), [(130.0, 10.0), (1000.0, 58.0), (60.0, 0.0)])
def test_a_time_limit_bounds_the_time_left(clock, limit, expected):
    clock._limit = limit
    assert left(clock) == pytest.approx(expected)


def test_time_before_a_run_was_resumed_counts_towards_its_limit():
    clock = RunClock(1.0)
    clock.start(45.0)
    assert clock.seconds_left == pytest.approx(15.0, abs=0.5)
    assert RunClock(None).seconds_left is None


def logged(clock: Clock, console: Console) -> str:
    """The output of two steps, a validation of two batches and the end."""
    callback = ProgressCallback(console, clock)
    callback.on_train_begin(None, state_at(0), None)
    for step in (1, 2):
        clock.now += 2.0
        callback.on_step_end(None, state_at(step), None)
        callback.on_log(None, state_at(step), None, dict(LOGS))
    for _ in range(2):
        callback.on_prediction_step(None, state_at(2), None, eval_dataloader=[0, 1])
    callback.on_log(None, state_at(2), None, {"eval_loss": 1.0, "eval_perplexity": 2.7, "eval_bits_per_byte": 1.4})
    callback.on_train_end(None, state_at(2), None)
    return console.file.getvalue()


def test_outputs_that_are_no_terminal_get_one_line_per_log_entry(clock):
    lines = logged(clock, Console(file=io.StringIO(), width=20)).splitlines()
    assert lines == [
        "step 1/40: loss 2.000 (1.500 bits per byte), 1,234 tokens/s, MFU 10.0%, waiting for data 0.00%, 1 GiB",
        "step 2/40: loss 2.000 (1.500 bits per byte), 1,234 tokens/s, MFU 10.0%, waiting for data 0.00%, 1 GiB, "
        "1 min 16 s left",
        "step 2: validation loss 1.000, perplexity 2.70, 1.400 bits per byte",
    ]


def test_a_terminal_shows_one_line_and_the_validations_above_it(clock):
    shown = logged(clock, Console(file=io.StringIO(), force_terminal=True, width=100, height=30, color_system=None))
    assert "step 2/40" in shown
    assert "1 min 16 s left" in shown
    assert shown.count("step 2: validation loss 1.000") == 1
    assert shown.endswith("\n\x1b[?25h")  # a whole line, and the cursor


def test_other_processes_show_nothing(clock):
    console = Console(file=io.StringIO(), force_terminal=True)
    callback = ProgressCallback(console, clock)
    state = state_at(1)
    state.is_world_process_zero = False
    callback.on_train_begin(None, state, None)
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, dict(LOGS))
    assert console.file.getvalue() == ""
