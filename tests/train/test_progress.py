"""The time left that a run shows."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from retnet.train import progress
from retnet.train.progress import ProgressCallback


def left(monkeypatch, *, first=0, step=10, max_steps=40, seconds=20.0, max_minutes=None) -> float:
    now = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    callback = ProgressCallback(Console(quiet=True), max_minutes)
    state = SimpleNamespace(global_step=first, max_steps=max_steps, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    state.global_step = step
    return callback._left(state)


def test_the_time_left_is_that_of_the_remaining_steps(monkeypatch):
    assert left(monkeypatch) == pytest.approx(60.0)


def test_a_resumed_run_counts_only_its_own_steps(monkeypatch):
    assert left(monkeypatch, first=30, step=35) == pytest.approx(20.0)


@pytest.mark.parametrize(("max_minutes", "expected"), [(0.5, 10.0), (10.0, 60.0), (0.25, 0.0)])
def test_a_time_limit_bounds_the_time_left(monkeypatch, max_minutes, expected):
    assert left(monkeypatch, max_minutes=max_minutes) == pytest.approx(expected)
