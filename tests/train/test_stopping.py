"""The end of a run, and the learning-rate schedule that follows from it."""

from __future__ import annotations

import json
import os
import signal

import pytest

from retnet.train.run import train
from retnet.train.stopping import ProcessConsensus, RunClock, TerminationSignal

from .conftest import recipe_for


def test_one_process_gets_back_what_it_gives():
    consensus = ProcessConsensus()
    agreed = consensus.reach(7, False, 1.5)
    assert (agreed.num_targets, agreed.terminate, agreed.seconds) == (7, False, 1.5)
    assert consensus.any(True)
    assert not consensus.any(False)


def test_sigterm_is_recorded_and_the_old_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with TerminationSignal() as termination:
        assert not termination.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.received
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_schedule_follows_the_steps_or_the_time_whichever_is_further():
    clock = RunClock(max_minutes=1.0)
    clock.start(earlier_seconds=0.0)
    rate = clock.schedule(lambda step: 1 - step / 100, max_steps=100)
    assert rate(30) == pytest.approx(0.7)
    clock.seconds = 45.0
    assert rate(30) == pytest.approx(0.25)
    assert rate(90) == pytest.approx(0.1)
    clock.seconds = 80.0
    assert (rate(30), clock.fraction) == (0.0, 1.0)


def test_a_clock_counts_the_time_before_a_run_was_resumed():
    clock = RunClock(None)
    clock.start(earlier_seconds=100.0)
    assert 100.0 <= clock.read() < 160.0
    assert clock.fraction == 0.0


def test_a_run_and_its_schedule_end_at_the_time_limit(dropout_model, text_folder, tmp_path, console):
    recipe = recipe_for(
        dropout_model, text_folder, tmp_path, max_steps=100_000, max_minutes=0.025, warmup_steps=0, do_eval=True
    )
    summary = train(recipe, console)
    assert 1.5 <= summary.seconds < 30.0
    assert summary.steps < 100_000
    log = json.loads((tmp_path / "training.json").read_text())["log"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.5 * recipe.training["learning_rate"]
    last_step = 2.5 / summary.steps  # its share of the run, with a margin for slow first steps
    assert rates[-1] < max(0.2, last_step) * recipe.training["learning_rate"]


def test_a_time_limit_needs_a_schedule_that_is_a_function_of_the_step(dropout_model, text_folder, tmp_path, console):
    settings = {"max_minutes": 1, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    recipe = recipe_for(dropout_model, text_folder, tmp_path, **settings)
    with pytest.raises(ValueError, match="reduce_lr_on_plateau with max_minutes; accepted there"):
        train(recipe, console)
