"""States of a run as tensors and plain values: back bit for bit, and refused where they are not of the run."""

from __future__ import annotations

import copy
import json
import math
import random
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from retnet.models.shards import Shards, open_shards
from retnet.train.checkpoints import CheckpointError, undone_on_error
from retnet.train.plain_state import from_plain, random_numbers, restore_random_numbers, to_plain
from retnet.train.shard_saver import ShardSaver
from retnet.train.shard_storage import ShardWriter
from retnet.train.sharded_state import (
    load_optimizer,
    load_weights,
    optimizer_tensors,
    optimizer_values,
    own_share,
    weight_tensors,
)

CPU = torch.device("cpu")


def stepped(kind=torch.optim.AdamW, steps: int = 3, **options):
    """A small model, one of whose parameters never has a gradient, and its optimizer after some steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(5, 2), "idle": nn.Linear(1, 1)})
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = kind([{"params": decayed, "weight_decay": 0.1}, {"params": rest}], lr=0.03, **options)
    for _ in range(steps):
        model["b"](model["a"](torch.randn(4, 3))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(tmp_path, model, optimizer, background=False) -> tuple[Shards, dict]:
    """What is read of a checkpoint that two processes would write: the tensors, and the plain values."""
    saver = ShardSaver(background, timeout=60)
    tensors = weight_tensors(model, set()) | optimizer_tensors(model, optimizer)
    hashes = {}
    saver.save(tmp_path, tensors, hashes.update)
    with torch.no_grad():  # a copy was taken
        (next(iter(model.parameters())).zero_() if background else None)
    saver.collect()
    saver.close()
    assert hashes.keys() == {path.name for path in tmp_path.glob("shard-*")}
    return open_shards(tmp_path), json.loads(json.dumps(optimizer_values(model, optimizer)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (torch.optim.ASGD, {}),
    ],
)
def test_a_loaded_optimizer_continues_with_the_same_bits(tmp_path, kind, options):
    model, optimizer = stepped(kind, **options)
    expected, expected_optimizer = copy.deepcopy((model, optimizer))
    shards, values = saved(tmp_path, model, optimizer, background=True)
    other, other_optimizer = stepped(kind, steps=0, **options)
    load_weights(shards, other, set())
    load_optimizer(shards, values, other, other_optimizer)
    for each, its in ((expected, expected_optimizer), (other, other_optimizer)):
        torch.manual_seed(1)
        each["b"](each["a"](torch.randn(4, 3))).square().sum().backward()
        its.step()
    assert all(map(torch.equal, expected.state_dict().values(), other.state_dict().values()))
    assert other_optimizer.state_dict()["param_groups"] == expected_optimizer.state_dict()["param_groups"]
    assert other_optimizer.state_dict()["state"].keys() == expected_optimizer.state_dict()["state"].keys()


def set_state(name, **changes):
    return lambda values: values["states"][name].update(changes)


def set_option(**changes):
    return lambda values: values["groups"][0]["options"].update(changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v.update(code=1), "accepted: groups and states"),
        (lambda v: v["groups"].pop(), "accepted: 2 of them"),
        (lambda v: v["groups"].reverse(), "group 0 of the optimizer .* is not of the 3 parameters"),
        (lambda v: v["states"].pop("a.weight"), r"has the tensor optimizer.a.weight.exp_avg, which no state names"),
        (lambda v: v["states"].update(c=1), "has a state of c, which it does not train"),
        (set_state("a.weight", tensors=["exp_avg"]), "has the tensor optimizer.a.weight.exp_avg_sq, which no state"),
        (set_state("a.weight", tensors=["exp_avg", "more"]), "has no optimizer.a.weight.more"),
        (set_state("a.weight", tensors=["a.b"]), "accepted: tensors and values"),
        (set_state("a.weight", tensors=None), "accepted: tensors and values"),
        (set_state("a.weight", more=1), "accepted: tensors and values"),
        (set_option(lr="fast"), "an option of the optimizer .*.lr is 'fast'; accepted: a value like 0.03"),
        (set_option(lr=True), "lr is True; accepted: a value like 0.03"),
        (set_option(betas=0.9), "betas is 0.9; accepted: a list"),
        (set_option(hook="x"), "accepted: a mapping of weight_decay, lr, "),
    ],
)
def test_values_of_another_optimizer_are_refused(tmp_path, damage, message):
    shards, values = saved(tmp_path, *stepped())
    damage(values)
    with pytest.raises(ValueError, match=message):
        load_optimizer(shards, values, *stepped(steps=0))


def test_weights_of_another_model_are_refused(tmp_path):
    shards, _ = saved(tmp_path, *stepped())
    for model, message in (
        (nn.ModuleDict({"a": nn.Linear(3, 5)}), "has tensors that the model has not: weights.b.bias"),
        (nn.ModuleDict({**stepped()[0], "c": nn.Linear(1, 1)}), "has no weights.c.weight"),
        (
            nn.ModuleDict({**stepped()[0], "a": nn.Linear(4, 5)}),
            r"is torch.float32 \[5, 3\], not torch.float32 \[5, 4\]",
        ),
        (stepped()[0].double(), r"is torch.float32 \[5, 3\], not torch.float64 \[5, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(shards, model, set())


class Quantized(torch.Tensor):
    """As the states of optimizers with 8 bits."""


def test_states_that_a_file_does_not_hold_are_refused_before_a_checkpoint_is_due():
    model, optimizer = stepped()
    state = optimizer.state[model["a"].weight]
    for key, value, message in (
        (
            "exp_avg",
            torch.zeros(5, 3).as_subclass(Quantized),
            "the optimizer's exp_avg of a.weight is a Quantized; acc",
        ),
        ("exp_avg", torch.zeros(5, 3, dtype=torch.complex64), "exp_avg of a.weight is of torch.complex64; accepted"),
        ("a.b", torch.zeros(1), "the optimizer keeps 'a.b' for a.weight; accepted: names like exp_avg"),
    ):
        before, state[key] = state.get(key), value
        with pytest.raises(ValueError, match=message):
            optimizer_tensors(model, optimizer)
        state[key] = before
    state["exp_avg"] = {1, 2}
    with pytest.raises(ValueError, match=r"state of a.weight.* is a set; accepted: numbers, text"):
        optimizer_values(model, optimizer)


def test_processes_share_whole_tensors_by_size():
    tensors = {name: torch.zeros(size) for name, size in (("a", 10), ("b", 6), ("c", 5), ("d", 1), ("e", 0))}
    shares = [own_share(tensors, process, 2) for process in range(2)]
    assert [sorted(share) for share in shares] == [["a", "d", "e"], ["b", "c"]]
    assert own_share(tensors, 0, 1) == tensors


def test_a_background_save_that_fails_says_why_once_it_is_collected(tmp_path, monkeypatch):
    def write_file(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_write_file", write_file)
    saver = ShardSaver(True, timeout=60)
    staging = tmp_path / ".saving"
    staging.mkdir()
    saver.save(staging, {"x": torch.zeros(2)}, lambda hashes: pytest.fail("it is not complete"))
    assert saver.pending
    assert isinstance(saver._saving, Future)
    assert isinstance(saver._saving.exception(), CheckpointException)
    assert saver.done
    message = r"checkpoint-1 could not be written \(.*No space left on device"
    with pytest.raises(CheckpointError, match=message), undone_on_error(tmp_path, "checkpoint-1"):
        saver.collect()
    assert not saver.pending
    assert not staging.exists()
    saver.close()


@pytest.mark.parametrize(
    "value", [1, 0.1, -0.0, 1e-320, math.inf, -math.inf, True, None, "x", [1.5, None], {"a": [{"b": 1}]}]
)
def test_plain_values_come_back(value):
    text = json.dumps(to_plain(value, "it"), allow_nan=False)
    back = from_plain(json.loads(text), value, "it")
    assert repr(back) == repr(value)
    assert (from_plain({}, None, "it"), from_plain(None, {}, "it")) == (None, {})
    assert math.isnan(from_plain(to_plain(math.nan, "it"), 1.0, "it"))
    assert from_plain(to_plain((1, (2.0, None)), "it"), (0, (0.0, None)), "it") == (1, (2.0, None))


@pytest.mark.parametrize("value", [torch.zeros(1), {1: 2}, object(), {"float": 1}, b"x", np.zeros(1), [lambda: 0]])
def test_what_json_does_not_hold_is_not_saved(value):
    with pytest.raises(ValueError, match=r"^it.* is a .*; accepted: numbers, text"):
        to_plain(value, "it")


@pytest.mark.parametrize(
    ("data", "current"),
    [("x", 1), (1, "x"), (1, True), (True, 1), ({"a": 1}, {"b": 1}), ({}, {"b": 1}), ([], {}), ({"a": 1}, None),
     (1, []), ([[1]], [1]), ([1], None), ({"float": "none"}, 1.0), ([{"a": 1}], (1,))],
)  # fmt: skip
def test_values_of_another_kind_are_refused(data, current):
    with pytest.raises(ValueError, match=r"^it.* is .*; accepted: "):
        from_plain(data, current, "it")


def drawn():
    return random.gauss(), np.random.standard_normal(), torch.randn(3).tolist()


def test_random_numbers_continue():
    drawn()  # half of a pair is left
    states = json.loads(json.dumps(random_numbers(CPU), allow_nan=False))
    expected = drawn()
    drawn()
    restore_random_numbers(states, CPU)
    assert drawn() == expected


def test_states_that_are_none_of_random_numbers_are_refused():
    good = random_numbers(CPU)
    for wrong in (
        {},
        good | {"cpu": "00"},
        good | {"cpu": "no"},
        good | {"cpu": 3},
        good | {"python": [3, [1, 2], None]},
        good | {"python": [9, *good["python"][1:]]},
        good | {"numpy": [*good["numpy"][:2], 10**6, 0, 0.0]},
        good | {"numpy": ["PCG64", *good["numpy"][1:]]},
        good | {"numpy": ["MT19937", [2**40] * 624, 0, 0, 0.0]},
        good | {"numpy": ["MT19937", [1], 0, 0, 0.0]},
        good | {"numpy": ["MT19937", [1] * 700, 699, 0, 0.0]},
    ):
        with pytest.raises(ValueError, match="no states of random numbers"):
            restore_random_numbers(wrong, CPU)
