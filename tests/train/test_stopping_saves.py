"""A run that a signal ends loses nothing, and resumes as if there had been no signal."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from retnet.system.lock import Locked, locked
from retnet.train.batches import ValidBatches
from retnet.train.run import train
from retnet.train.stopping import Terminated
from retnet.train.trainer import PackedTrainer

from .conftest import losses, recipe_for, weights, words_for

VALIDATING = {"eval_strategy": "steps", "eval_steps": 4, "do_eval": True, "valid_rows": 16}
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@pytest.fixture
def signal_in_step(monkeypatch):
    """A function that sends a signal in the middle of a step, in the next run."""
    original = PackedTrainer.training_step

    def patch(number: int, step: int) -> None:
        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == step and not self.signal.received:
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(PackedTrainer, "training_step", training_step)

    return patch


@pytest.fixture
def signal_in_validation(monkeypatch):
    """A function that sends a signal in the n-th validation of the next run."""
    original = PackedTrainer._loader

    def patch(number: int, nth: int = 1) -> None:
        validations = []

        def _loader(self, rows, batches):
            if isinstance(batches, ValidBatches):
                validations.append(self.state.global_step)
                if len(validations) == nth:
                    os.kill(os.getpid(), number)
            return original(self, rows, batches)

        monkeypatch.setattr(PackedTrainer, "_loader", _loader)

    return patch


def validations(output):
    """(step, loss) of every validation in the log."""
    log = json.loads((output / "training.json").read_text())["log"]
    return [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]


def assert_resumed_as_undisturbed(model, data, stopped, whole, console, settings):
    train(recipe_for(model, data, stopped, **settings, resume_from_checkpoint="auto"), console)
    assert losses(stopped) == losses(whole)
    assert validations(stopped) == validations(whole)
    assert weights(stopped) == weights(whole)


@BOTH
@pytest.mark.parametrize("limit", [{"save_strategy": "no"}, {"max_minutes": 0.02, "max_steps": 100_000}], ids=str)
def test_a_signal_in_the_last_validation_leaves_the_trained_model_and_a_checkpoint(
    dropout_model, text_folder, tmp_path, console, signal_in_validation, monkeypatch, number, limit
):
    settings = {"max_steps": 3, "do_eval": True, "valid_rows": 16, "num_samples": 1} | limit
    signal_in_validation(number)
    with pytest.raises(Terminated, match=r"the model is saved in .*, without its last validation; resume_from"):
        train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    saved = weights(tmp_path)
    [checkpoint] = tmp_path.glob("checkpoint-*")
    monkeypatch.undo()
    summary = train(
        recipe_for(dropout_model, text_folder, tmp_path, **settings, resume_from_checkpoint="auto"), console
    )
    assert checkpoint.name == f"checkpoint-{summary.steps}", "no step was added"
    assert summary.valid_loss is not None
    assert weights(tmp_path) == saved
    assert (tmp_path / "samples.txt").exists()


@pytest.mark.parametrize(
    ("settings", "signalled", "step"),
    [
        ({}, 3, 4),
        pytest.param({"checkpoints": "async", "save_strategy": "steps", "save_steps": 2}, 3, 4, marks=pytest.mark.slow),
        pytest.param({}, 8, 8, marks=pytest.mark.slow),
        pytest.param({"eval_strategy": "epoch"}, 8, 8, marks=pytest.mark.slow),
        pytest.param({"eval_strategy": "epoch", "length": 480, "max_steps": 6}, 3, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_signal_in_a_step_before_a_validation_resumes_with_that_validation(
    dropout_model, text_folder, tmp_path, console, signal_in_step, monkeypatch, settings, signalled, step
):
    """Also at the end of an epoch, which the Trainer does not see in a run that a signal ends."""
    settings = VALIDATING | {"max_steps": 8} | settings
    train(recipe_for(dropout_model, text_folder, tmp_path / "whole", **settings), console)
    signal_in_step(signal.SIGTERM, signalled)
    with pytest.raises(Terminated, match=f"terminated at step {step};"):
        train(recipe_for(dropout_model, text_folder, tmp_path / "stopped", **settings), console)
    monkeypatch.undo()
    assert_resumed_as_undisturbed(
        dropout_model, text_folder, tmp_path / "stopped", tmp_path / "whole", console, settings
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": "{patience: 0, factor: 0.1, mode: max}",
        },
        pytest.param(
            {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"save_strategy": "best", "metric_for_best_model": "eval_loss", "save_total_limit": 1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "plateau", "best at the end", "save best"],
)
@pytest.mark.parametrize("nth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_validation_that_a_signal_stopped_is_done_when_the_run_is_resumed(
    dropout_model, text_folder, tmp_path, console, signal_in_validation, monkeypatch, settings, nth
):
    """What validation decides (the rate on a plateau, the best checkpoint) is decided as without the signal."""
    settings = VALIDATING | {"max_steps": 6, "eval_steps": 2} | settings
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(recipe_for(dropout_model, text_folder, whole, **settings), console)
    signal_in_validation(signal.SIGTERM, nth)
    with pytest.raises(Terminated, match=f"terminated at step {2 * nth};"):
        train(recipe_for(dropout_model, text_folder, stopped, **settings), console)
    assert (stopped / f"checkpoint-{2 * nth}/complete.json").exists()
    monkeypatch.undo()
    assert_resumed_as_undisturbed(dropout_model, text_folder, stopped, whole, console, settings)
    assert best_steps(stopped) == best_steps(whole)


def best_steps(output):
    """The checkpoints that are left, and the best one that the newest of them knows."""
    left = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    best = json.loads((left[-1] / "trainer_state.json").read_text())["best_global_step"] if left else None
    return best


def test_a_signal_keeps_its_checkpoint_beside_the_best_one(
    dropout_model, text_folder, tmp_path, console, monkeypatch, signal_in_step
):
    """With save_total_limit=1, the Trainer removes all but the best one at the end of a run."""
    scores = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(PackedTrainer, "_score", lambda self, rows: torch.tensor([next(scores), 1.0]))
    signal_in_step(signal.SIGTERM, 4)
    settings = VALIDATING | {
        "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "max_steps": 8,
        "load_best_model_at_end": True,
    }  # fmt: skip
    with pytest.raises(Terminated):
        train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}


@BOTH
def test_the_exit_code_is_that_of_the_signal(dropout_model, text_folder, tmp_path, signal_in_step, capfd, number):
    from retnet.cli import main

    signal_in_step(number, 1)
    with pytest.raises(SystemExit) as ended:
        main(["train", *words_for(dropout_model, text_folder, tmp_path, save_strategy="no")])
    assert ended.value.code == 128 + number
    shown = capfd.readouterr()
    assert "terminated at step 2; resume_from_checkpoint=auto resumes" in shown.out
    assert ("Ctrl-C again ends the run" in shown.err) == (number == signal.SIGINT)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}


def test_a_checkpoint_between_the_last_step_of_an_epoch_and_its_validation_resumes_with_it(
    dropout_model, text_folder, tmp_path, console
):
    """Epochs have two steps here. A run that is killed there leaves such a checkpoint."""
    settings = {"eval_strategy": "epoch", "do_eval": True, "length": 480, "max_steps": 4, "save_steps": 1}
    settings |= {"save_strategy": "steps", "save_total_limit": 9}
    train(recipe_for(dropout_model, text_folder, tmp_path / "whole", **settings), console)
    settings |= {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"}
    train(recipe_for(dropout_model, text_folder, tmp_path / "resumed", **settings), console)
    assert [step for step, _ in validations(tmp_path / "whole")] == [2, 4]
    assert validations(tmp_path / "resumed") == validations(tmp_path / "whole")


def test_a_signal_during_the_samples_ends_them_and_the_run_is_complete(
    dropout_model, text_folder, tmp_path, console, monkeypatch
):
    from retnet.train import finish

    original = finish.generate

    def generate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(finish, "generate", generate)
    train(recipe_for(dropout_model, text_folder, tmp_path, max_steps=1, num_samples=3), console)
    assert "with 1 of 3 samples" in console.file.getvalue()
    assert (tmp_path / "training.json").exists()


def test_a_run_in_the_output_folder_of_a_run_is_refused_and_changes_nothing(
    dropout_model, text_folder, tmp_path, console
):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    before = weights(tmp_path)
    with locked(tmp_path):
        for more in ({"resume_from_checkpoint": "auto"}, {"save_strategy": "no"}, {}):
            with pytest.raises(Locked, match=f"{tmp_path} is being written by process {os.getpid()} on "):
                train(recipe_for(dropout_model, text_folder, tmp_path, **settings | {"seed": 1} | more), console)
    assert weights(tmp_path) == before
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
