"""Runs of models under muP: rates per group, resumption, several processes."""

from __future__ import annotations

import pytest

from retnet.models.directory import save_model
from retnet.models.lm import LanguageModel
from retnet.models.mup import with_mup
from retnet.train.run import train
from retnet.train.trainer import PackedTrainer
from tests.small_models import BYTES, EXPERTS, MAMBA2, PAPER, WIDTH, replace, small_config

from .conftest import losses, recipe_for, weights, words_for
from .test_run_distributed import FSDP, assert_same_run, train_on_processes
from .test_run_distributed import SETTINGS as PROCESSES

SAVING = {"save_strategy": "steps", "save_steps": 2}
RATE = {"adamw_torch": 1e-2, "muon": 2e-2}


@pytest.fixture(scope="module")
def mup_model(tmp_path_factory):
    """A byte model four times as wide as its base, whose parts are of several kinds."""
    directory = tmp_path_factory.mktemp("models") / "mup"
    layers = [PAPER, MAMBA2, replace(PAPER, feed_forward=replace(EXPERTS, load_balance_coef=0.0))]
    save_model(LanguageModel(with_mup(small_config(layers, **BYTES, init="paper"), WIDTH // 4)), directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
def test_a_run_under_mup_has_its_rates_and_resumes_bit_for_bit(
    optim, mup_model, text_folder, tmp_path, console, monkeypatch
):
    made, original = [], PackedTrainer.create_optimizer
    monkeypatch.setattr(
        PackedTrainer, "create_optimizer", lambda self, *a, **k: made.append(original(self, *a, **k)) or made[-1]
    )
    settings = SAVING | {"max_steps": 4, "optim": optim, "learning_rate": RATE[optim], "router_lr_multiplier": 0.5}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe_for(mup_model, text_folder, whole, **settings), console)
    rates = {group["initial_lr"] / RATE[optim] for group in made[0].param_groups if group["params"]}
    assert rates == {1.0, 0.125, 0.5 if optim == "muon" else 0.25}  # of inputs, the router, hidden matrices
    assert {group["eps"] for group in made[0].param_groups} == {1e-8 / 4}
    assert "muP: 4 times the base width 8" in console.file.getvalue()
    again = {"resume_from_checkpoint": whole / "checkpoint-2"}
    train(recipe_for(mup_model, text_folder, resumed, **settings, **again), console)
    assert losses(resumed) == losses(whole)
    assert weights(resumed) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
def test_two_processes_with_shards_train_as_one_under_mup(optim, mup_model, text_folder, tmp_path, console):
    settings = PROCESSES | {"optim": optim, "learning_rate": RATE[optim], "gradient_accumulation_steps": 1}
    one, two = settings | {"per_device_train_batch_size": 16}, settings | {"per_device_train_batch_size": 8} | FSDP
    train(recipe_for(mup_model, text_folder, tmp_path / "one", **one), console)
    train_on_processes(2, words_for(mup_model, text_folder, tmp_path / "two", **two))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_an_optimizer_without_rules_is_refused(mup_model, text_folder, tmp_path, console):
    with pytest.raises(ValueError, match="muP has no rules for SGD; accepted: AdamW, or optim=muon"):
        train(recipe_for(mup_model, text_folder, tmp_path / "out", max_steps=1, optim="sgd"), console)
