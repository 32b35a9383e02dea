"""Runs with method=state: only the initial state is trained, every document starts from it, and runs resume."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

import retnet
from retnet.models.directory import load_model, save_model
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.train.recipe import load_recipe
from retnet.train.run import train
from retnet.train.state_effect import EFFECT_FILE
from retnet.train.state_tuning import STATE_FILE, StateTunedForCausalLM
from tests.models.test_initial_state import DOCUMENTS, learned, recurrent_loss
from tests.small_models import ALIBI, BYTES, CONV, EXPERTS, PAPER, random_ids, small_model

from .conftest import recipe_for, words_for
from .test_run_distributed import train_on_processes

QUICK = {
    "method": "state",
    "max_steps": 4,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.3,
}
RESUMING = QUICK | {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def stack_model(tmp_path_factory):
    """A convolution, a fixed decay, attention and experts, at unit gain."""
    directory = tmp_path_factory.mktemp("models") / "tuned"
    experts = replace(EXPERTS, bias_update_rate=0.01)
    stack = [CONV, replace(PAPER, dropout=0.2), ALIBI, replace(PAPER, feed_forward=experts)]
    save_model(small_model(stack, **BYTES), directory)
    return directory


def state_of(output) -> bytes:
    return (output / STATE_FILE).read_bytes()


def test_a_run_learns_a_state_and_leaves_the_model_as_it_is(stack_model, text_folder, tmp_path, console):
    before = {file.name: file.read_bytes() for file in stack_model.iterdir()}
    output = tmp_path / "out"
    settings = QUICK | {"do_eval": True, "valid_rows": 40, "num_samples": 1, "save_strategy": "steps", "save_steps": 4}
    summary = train(recipe_for(stack_model, text_folder, output, **settings), console)
    assert {file.name: file.read_bytes() for file in stack_model.iterdir()} == before
    text = console.file.getvalue()
    assert "values of the initial state of 3 of 4 layers; attention has no such state (layer 2)" in text
    assert "router loss" not in text
    assert "busiest expert" not in text
    effect = json.loads((output / EFFECT_FILE).read_text())
    count = sum(span["tokens"] for span in effect["spans"])
    without, tuned = (sum(s["tokens"] * s[name] for s in effect["spans"]) / count for name in ("without", "with_state"))
    assert tuned == pytest.approx(summary.valid_loss, rel=1e-5)
    assert tuned < without - 0.1
    assert not (output / "model.safetensors").exists()
    assert sum(file.stat().st_size for file in (output / "checkpoint-4").rglob("*.safetensors")) < 2**16
    model, snapshot = load_model(stack_model), Snapshot.load(output / STATE_FILE)
    Engine(model, num_slots=1, max_tokens=64).check_snapshot(snapshot)
    shutil.rmtree(output / "checkpoint-4")
    with pytest.raises(FileExistsError, match="exists; accepted: another output_dir, or force=true"):
        train(recipe_for(stack_model, text_folder, output, **QUICK), console)
    texts = [
        retnet.generate(stack_model, "state", state=state, max_tokens=9, temperature=0)
        for state in (output / STATE_FILE, snapshot, None)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_every_document_of_a_pack_starts_from_the_state():
    packed = StateTunedForCausalLM.trainable(small_model("hybrid"))
    packed.initial.load_state_dict(learned(packed.model).state_dict())
    ids, targets = random_ids(31), random_ids(31, seed=1)
    bounds = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()])
    inputs = {name: x[None] for name, x in (("input_ids", ids), ("labels", targets), ("shift_labels", targets))}
    fresh = torch.ones(1).bool()
    output = packed(**inputs, cu_seq_lens_q=bounds, begins_fresh=fresh, num_items_in_batch=31)
    expected = recurrent_loss(packed.model, packed.initial, ids, targets)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)


def test_the_frozen_model_computes_as_it_serves(stack_model):
    packed = StateTunedForCausalLM.trainable(load_model(stack_model))
    assert packed.training
    assert packed.model.training  # which recomputation in the backward depends on
    assert not any(module.training for module in packed.model.layers.modules())
    assert {name.split(".")[0] for name, x in packed.named_parameters() if x.requires_grad} == {"initial"}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_one_that_was_never_stopped(text_folder, tmp_path, console, dtype):
    base = tmp_path / "base"
    save_model(small_model([CONV, PAPER], **BYTES, dtype=dtype), base)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(recipe_for(base, text_folder, whole, **RESUMING), console)
    shutil.copytree(whole / "checkpoint-2", stopped / "checkpoint-2")
    train(recipe_for(base, text_folder, stopped, **RESUMING, resume_from_checkpoint="auto"), console)
    assert state_of(stopped) == state_of(whole)
    snapshot = Snapshot.load(whole / STATE_FILE)
    assert {str(x.dtype)[6:] for x in snapshot.state.named_tensors().values()} == {"int64", "float32", dtype}
    other = load_model(base)
    other.embedding.weight.data[0, 0] += 1
    save_model(other, base)
    with pytest.raises(ValueError, match=r"weights was .* and is"):
        train(recipe_for(base, text_folder, stopped, **RESUMING, resume_from_checkpoint="auto"), console)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"recompute": "layer"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_other_ways_to_compute_a_step_give_the_same_state(stack_model, text_folder, tmp_path, console, changed):
    rows = 4 // changed.get("gradient_accumulation_steps", 1)
    train(recipe_for(stack_model, text_folder, tmp_path / "a", **QUICK), console)
    train(
        recipe_for(stack_model, text_folder, tmp_path / "b", **QUICK | changed | {"per_device_train_batch_size": rows}),
        console,
    )
    one, other = (Snapshot.load(tmp_path / name / STATE_FILE).state.named_tensors() for name in "ab")
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_two_processes_learn_the_state_of_one(stack_model, text_folder, tmp_path, console):
    shown = train_on_processes(
        2, words_for(stack_model, text_folder, tmp_path / "b", **QUICK | {"per_device_train_batch_size": 2})
    )
    assert shown.count("values of the initial state") == 1
    train(recipe_for(stack_model, text_folder, tmp_path / "a", **QUICK), console)
    one, other = (Snapshot.load(tmp_path / name / STATE_FILE).state.named_tensors() for name in "ab")
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["carry_state=true"], "carry_state is 'true' with method 'state'; accepted: false"),
        (["context_parallel=2"], "context_parallel is '2' with method 'state'; accepted: 1"),
        (["checkpoints=async"], "checkpoints is 'async' with method 'state'; accepted: whole"),
        (["fsdp=full_shard"], "fsdp is 'full_shard' with method 'state'; accepted: none"),
        (["push_to_hub=true"], "push_to_hub is True with method 'state'; accepted: none"),
        (["optim=muon"], "optim is 'muon' with method 'state'; accepted: an optimizer"),
        (["router_lr_multiplier=0.5"], "router_lr_multiplier is '0.5' with method 'state'; accepted: 1"),
        (["model=retnet-tiny"], "model is 'retnet-tiny' with method 'state'; accepted: a saved directory"),
        (["method=states"], "method is 'states'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_state_excludes_is_refused_by_name(settings, fault):
    words = {"model": "somewhere", "data": "texts", "method": "state"} | dict(word.split("=") for word in settings)
    with pytest.raises(ValueError, match=fault):
        load_recipe(None, [f"{key}={value}" for key, value in words.items()])


def test_a_state_has_defaults_of_its_own():
    recipe = load_recipe(None, ["model=some/where", "data=texts", "method=state"])
    assert recipe.training["learning_rate"] > 1e-3
    assert recipe.training["weight_decay"] == 0
    assert recipe.training["output_dir"].endswith("where-state")
    assert math.isclose(load_recipe(None, ["model=some/where", "data=texts"]).training["learning_rate"], 1e-3)
