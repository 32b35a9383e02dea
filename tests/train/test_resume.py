"""A run that was killed and resumed equals one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retnet.train.run import train
from retnet.train.stopping import Terminated

from .conftest import losses, recipe_for, weights, words_for

KILLED_RUN = Path(__file__).with_name("killed_run.py")
SAVING = {"save_strategy": "steps", "save_steps": 5}
ASYNC = {"checkpoints": "async"}


def run_and_die(place: str, words: list[str]) -> None:
    process = subprocess.run([sys.executable, str(KILLED_RUN), place, *words], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


@pytest.mark.parametrize(
    ("places", "settings", "resumed_at"),
    [
        pytest.param(["step:8"], {}, "checkpoint-5", id="mid-epoch", marks=pytest.mark.slow),
        pytest.param(["save:10"], {}, "checkpoint-5", id="mid-save"),
        pytest.param(["write:10"], ASYNC, "checkpoint-5", id="mid-write", marks=pytest.mark.slow),
        pytest.param(
            ["commit:5", "write:15"],
            ASYNC | {"carry_state": True, "optim": "muon", "save_total_limit": 1},
            "checkpoint-10",
            id="before-commit-and-mid-write",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["save:10", "step:22"],
            {"carry_state": True},
            "checkpoint-20",
            id="twice-with-carried-states",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    dropout_model, text_folder, tmp_path, console, places, settings, resumed_at
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(recipe_for(dropout_model, text_folder, whole, **SAVING, **settings), console)
    for place in places:
        run_and_die(
            place, words_for(dropout_model, text_folder, killed, **SAVING, **settings, resume_from_checkpoint="auto")
        )
    assert not (killed / "training.json").exists()
    report = (killed / "report.html").read_text()
    assert 'class="status running"' in report
    assert report.endswith("</html>\n")
    train(recipe_for(dropout_model, text_folder, killed, **SAVING, **settings, resume_from_checkpoint="auto"), console)
    assert f"resuming from {killed / resumed_at}" in console.file.getvalue()
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 24
    assert weights(killed) == weights(whole)


def test_a_run_stopped_by_sigterm_resumes_in_the_middle_of_a_log_interval(
    dropout_model, text_folder, tmp_path, console, monkeypatch
):
    settings = {"logging_steps": 4, "carry_state": True}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(recipe_for(dropout_model, text_folder, whole, **settings), console)
    from retnet.train.trainer import PackedTrainer

    original = PackedTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(PackedTrainer, "training_step", training_step)
        with pytest.raises(Terminated, match="terminated at step 11; resume_from_checkpoint=auto resumes from"):
            train(recipe_for(dropout_model, text_folder, stopped, **settings), console)
    assert signal.getsignal(signal.SIGTERM) == before
    assert (stopped / "checkpoint-11/complete.json").exists()
    report = (stopped / "report.html").read_text()
    assert "stopped</span> terminated at step 11; resume_from_checkpoint=auto resumes from" in report
    train(recipe_for(dropout_model, text_folder, stopped, **settings, resume_from_checkpoint="true"), console)
    kept = {step: loss for step, loss in losses(stopped).items() if step % 4 == 0 and step > 12}
    assert kept == {step: loss for step, loss in losses(whole).items() if step > 12}
    assert weights(stopped) == weights(whole)


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(dropout_model, text_folder, tmp_path, console, monkeypatch):
    """Validation is best at step 4, and one more checkpoint is kept."""
    from retnet.train.trainer import PackedTrainer

    scores = iter([2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(PackedTrainer, "_score", lambda self, rows: torch.tensor([next(scores), 1.0]))
    settings = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 1, "load_best_model_at_end": True,
    }  # fmt: skip
    train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    best = tmp_path / "checkpoint-4"
    assert list(tmp_path.glob("checkpoint-*")) == [best]
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert weights(tmp_path) == weights(best)


def test_checkpoints_are_read_with_weights_only(dropout_model, text_folder, tmp_path, console, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "num_train_epochs": 1}
    train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    read = []
    original = torch.load

    def load(file, *args, **kwargs):
        read.append((Path(file).name, kwargs.get("weights_only")))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    recipe = recipe_for(
        dropout_model, text_folder, tmp_path, **settings, resume_from_checkpoint=tmp_path / "checkpoint-2"
    )
    train(recipe, console)
    assert {name for name, _ in read} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(only is True for _, only in read)


def test_a_folder_with_checkpoints_is_not_overwritten(dropout_model, text_folder, tmp_path, console):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    with pytest.raises(ValueError, match="checkpoint-2; accepted: resume_from_checkpoint=auto"):
        train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)


def test_resuming_a_finished_run_validates_and_saves_without_training(dropout_model, text_folder, tmp_path, console):
    """As after a kill during the last validation. At a constant rate one more step would change the weights."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    first = train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    before = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    again = train(recipe_for(dropout_model, text_folder, tmp_path, **settings, resume_from_checkpoint="auto"), console)
    assert weights(tmp_path) == before
    assert (again.steps, again.tokens) == (8, first.tokens)
    assert again.seconds >= 0.5 * first.seconds, "the time before resuming counts"
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
