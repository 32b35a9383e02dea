"""Runs whose rows are shared by processes, on gloo: the losses, gradients and weights of one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retnet.models.directory import load_model, save_model
from retnet.train.run import train
from tests.small_models import BIRKHOFF, BYTES, CONV, GATED, MAMBA2, NOPE, PAPER, WINDOW, small_model
from tests.torchrun import torchrun

from .conftest import losses, recipe_for, weights, words_for

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent
STACKS = {
    "gated": (GATED, CONV),
    "hybrid": (PAPER, WINDOW, replace(GATED, hyper=BIRKHOFF), replace(NOPE, hyper=BIRKHOFF)),
    "mamba2": (MAMBA2, MAMBA2),
}
# 6 rows per step: with 1, 2 and 4 shards of a batch of 3 or 6, borders lie inside rows.
STEP: dict[str, Any] = {
    "max_steps": 4, "max_grad_norm": 0.5, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1,
    "learning_rate": 3e-3, "do_eval": True, "length": 64,
}  # fmt: skip
ACCUMULATED = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
TWO_GROUPS = {"per_device_train_batch_size": 3}
# DDP otherwise sums gradients in another order from the second step on, and four terms round differently.
FIXED_BUCKETS = {"ddp_find_unused_parameters": True}
FSDP = {"fsdp": "true", "fsdp_config": "{state_dict_type: SHARDED_STATE_DICT}"}
ASYNC = {"fsdp": "true", "checkpoints": "async"}
MUON = {"optim": "muon"}

# By the number of processes: the stack, the settings, and those that one process needs too.
RUNS: dict[int, dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    2: {
        "ddp": ("gated", {"context_parallel": 2, **ACCUMULATED}, {}),
        "attention": ("hybrid", {"context_parallel": 2}, {}),
        "muon": ("hybrid", {"context_parallel": 2}, MUON),
        "mamba2": ("mamba2", {"context_parallel": 2, **ACCUMULATED}, {}),
        "recomputed": ("hybrid", {"context_parallel": 2, "gradient_checkpointing": True}, {}),
        "fsdp": ("gated", {"context_parallel": 2, **ACCUMULATED, **FSDP}, {}),
        "fsdp-muon": ("hybrid", {"context_parallel": 2, **FSDP}, MUON),
    },
    4: {
        "two-groups": ("gated", {"context_parallel": 2, **TWO_GROUPS}, {}),
        "four-shards": ("hybrid", {"context_parallel": 4, **ACCUMULATED}, {}),
        "fsdp": ("hybrid", {"context_parallel": 2, **TWO_GROUPS, **FSDP}, {}),
        "fsdp-muon": ("gated", {"context_parallel": 2, **TWO_GROUPS, **FSDP}, MUON),
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the stacks, in float64 and at unit gain: what crosses a border matters."""
    folder = tmp_path_factory.mktemp("models")
    for name, stack in STACKS.items():
        save_model(small_model(stack, dtype="float64", name=name, **BYTES), folder / name)
    return {name: folder / name for name in STACKS}


def train_all(processes: int, runs: list[dict[str, Any]], folder: Path) -> None:
    file = folder / f"runs-{processes}.json"
    file.write_text(json.dumps(runs))
    done = torchrun(processes, SCRIPTS / "context_runs.py", file)
    assert done.returncode == 0, done.stdout + done.stderr


def logged(output: Path) -> dict[str, list[float]]:
    """What a run logged of its steps and its validation, without times."""
    log = json.loads((output / "training.json").read_text())["log"]
    names = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_byte", "epoch")
    return {name: [entry[name] for entry in log if name in entry] for name in names}


def assert_same_run(output: Path, expected: Path) -> None:
    """Logged losses are float32; all else is float64."""
    found, wanted = logged(output), logged(expected)
    assert found.pop("loss") == pytest.approx(wanted.pop("loss"), rel=1e-6)
    assert found == {name: pytest.approx(values, rel=1e-9) for name, values in wanted.items()}
    trained, aim = load_model(output).state_dict(), load_model(expected).state_dict()
    assert trained.keys() == aim.keys()
    for name in aim:
        assert (trained[name] - aim[name]).norm() <= 1e-9 * aim[name].norm(), name
    summaries = [json.loads((path / "training.json").read_text())["summary"] for path in (output, expected)]
    assert summaries[0]["tokens"] == summaries[1]["tokens"] == 4 * 6 * 64


@pytest.mark.parametrize("processes", RUNS)
def test_a_run_on_shards_is_that_of_one_process(models, short_texts, tmp_path, console, processes):
    runs = []
    for name, (stack, settings, _) in RUNS[processes].items():
        both = STEP | settings | RUNS[processes][name][2]
        runs.append({"words": words_for(models[stack], short_texts, tmp_path / name, **both), "reordered": False})
    train_all(processes, runs, tmp_path)
    for name, (stack, _, settings) in RUNS[processes].items():
        expected = tmp_path / "-".join(["one", stack, *settings])
        if not expected.exists():
            train(recipe_for(models[stack], short_texts, expected, **STEP, **settings), console)
            assert min(logged(expected)["grad_norm"]) > 0.5, "gradients are clipped"
        assert_same_run(tmp_path / name, expected)


def test_a_reordered_row_is_another_run(models, short_texts, tmp_path, console):
    """Load-balanced attention cuts rows into 2 N chunks and gives each process an early and a late one."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = words_for(models["gated"], short_texts, two, **STEP, context_parallel=2)
    train_all(2, [{"words": words, "reordered": True}], tmp_path)
    train(recipe_for(models["gated"], short_texts, one, **STEP), console)
    with pytest.raises(AssertionError):
        assert_same_run(two, one)
    assert losses(two)[1] != pytest.approx(losses(one)[1], rel=1e-3)


@pytest.mark.parametrize(("processes", "settings"), [(2, {}), (4, TWO_GROUPS | FIXED_BUCKETS), (2, ASYNC)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    dropout_model, short_texts, tmp_path, processes, settings
):
    """Bit for bit, with dropout, killed in the middle of step 6."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "context_parallel": 2}
    settings = STEP | saving | settings | {"resume_from_checkpoint": "auto"}
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    words = words_for(dropout_model, short_texts, killed, **settings)
    died = torchrun(processes, SCRIPTS / "killed_run.py", "step:6", *words)
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL)" in died.stderr
    saved = {path.name for path in killed.glob("checkpoint-*")}
    assert "checkpoint-2" in saved  # 4 may be unfinished in the background
    assert not (killed / "training.json").exists()
    runs = [{"words": words_for(dropout_model, short_texts, whole, **settings), "reordered": False}]
    train_all(processes, runs, tmp_path)
    train_all(processes, [{"words": words, "reordered": False}], tmp_path)
    assert list(losses(whole)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged(killed) == logged(whole)
    assert weights(killed) == weights(whole)


def test_one_process_resumes_a_run_on_shards(models, short_texts, tmp_path, console):
    saving = {"save_strategy": "steps", "save_steps": 2}
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    words = words_for(models["gated"], short_texts, two, **STEP, **saving, context_parallel=2)
    train_all(2, [{"words": words, "reordered": False}], tmp_path)
    train(recipe_for(models["gated"], short_texts, one, **STEP), console)
    checkpoint = two / "checkpoint-2"
    train(recipe_for(models["gated"], short_texts, resumed, **STEP, resume_from_checkpoint=checkpoint), console)
    assert f"resuming from {checkpoint}" in console.file.getvalue() or "step 3/4" in console.file.getvalue()
    assert_same_run(two, one)
    assert_same_run(resumed, one)
