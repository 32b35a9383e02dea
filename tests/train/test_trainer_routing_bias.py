"""Runs of mixtures of experts that are balanced by biases: resumed, on several processes, in transformers' Trainer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from retnet.layers.moe import MoE
from retnet.models.directory import load_model, save_model
from retnet.train.run import train
from tests.small_models import BYTES, GROUPED, PAPER, small_model

from .conftest import losses, recipe_for, weights, words_for
from .test_run_distributed import FSDP, SETTINGS, assert_same_run, train_on_processes

RATE = 0.01


@pytest.fixture(scope="module")
def expert_model(tmp_path_factory):
    """A byte model whose experts have room for all tokens, with a bias that is not at its start."""
    directory = tmp_path_factory.mktemp("models") / "experts"
    experts = replace(GROUPED, bias_update_rate=RATE)
    model = small_model([replace(PAPER, feed_forward=experts)] * 2, **BYTES, init="paper", name="experts")
    model.layers[0].feed_forward.routing_bias[1] = 0.05
    save_model(model, directory)
    return directory


def biases(output) -> list[torch.Tensor]:
    return [module.routing_bias for module in load_model(output).modules() if isinstance(module, MoE)]


def test_biases_move_once_per_step_and_a_resumed_run_is_the_same(expert_model, text_folder, tmp_path, console):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}  # two micro-batches per step
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe_for(expert_model, text_folder, whole, **settings), console)
    for before, after in zip(biases(expert_model), biases(whole), strict=True):
        steps = ((after - before) / RATE).round()
        torch.testing.assert_close(after, before + RATE * steps)
        assert (steps != 0).any()
        assert steps.abs().max() <= 4
    log = json.loads((whole / "training.json").read_text())["log"]
    assert all(1 <= entry["expert_peak"] <= 6 for entry in log if "loss" in entry)
    assert "times its share" in console.file.getvalue()
    again = {"resume_from_checkpoint": whole / "checkpoint-2"}
    train(recipe_for(expert_model, text_folder, resumed, **settings, **again), console)
    assert losses(resumed) == losses(whole)
    assert weights(resumed) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_with_accumulation_have_the_biases_of_one(expert_model, text_folder, tmp_path, console, sharding):
    """Under SGD: the steps of AdamW on gradients near 0 have the sign of a rounding error, which moves tokens."""
    settings = SETTINGS | {"optim": "sgd", "learning_rate": 0.5}
    rows = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    train(recipe_for(expert_model, text_folder, tmp_path / "one", **settings | rows), console)
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    train_on_processes(2, words_for(expert_model, text_folder, tmp_path / "two", **settings | rows | sharding))
    assert_same_run(tmp_path / "two", tmp_path / "one")
    for one, two, before in zip(*map(biases, (tmp_path / "one", tmp_path / "two", expert_model)), strict=True):
        torch.testing.assert_close(two, one)
        assert not torch.equal(one, before)
