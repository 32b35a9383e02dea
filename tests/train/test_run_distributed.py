"""Several processes under torchrun, on gloo: the same run as with one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from retnet.models.directory import load_model
from retnet.train.run import train

from .conftest import losses, recipe_for, words_for

SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "do_eval": True}
FSDP = {"fsdp": "true", "fsdp_config": "{state_dict_type: SHARDED_STATE_DICT}"}


def torchrun(processes: int, words: list[str]) -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launch, "-m", "retnet.cli", "train", *words], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def assert_same_run(output, expected):
    """Equal up to rounding, since sums are taken in another order."""
    assert losses(output).keys() == losses(expected).keys() == {1, 2, 3, 4}
    assert list(losses(output).values()) == pytest.approx(list(losses(expected).values()), rel=2e-5)
    trained, wanted = load_model(output).state_dict(), load_model(expected).state_dict()
    assert trained.keys() == wanted.keys()
    for name in wanted:
        assert (trained[name] - wanted[name]).norm() <= 1e-3 * wanted[name].norm(), name


@pytest.fixture
def one_process(byte_model, text_folder, tmp_path, console):
    """The output of a run with 16 rows per step in one batch."""
    settings = SETTINGS | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    train(recipe_for(byte_model, text_folder, tmp_path / "one", **settings), console)
    return tmp_path / "one"


def test_two_processes_with_accumulation_train_as_one_without(byte_model, text_folder, tmp_path, one_process):
    settings = SETTINGS | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    shown = torchrun(2, words_for(byte_model, text_folder, tmp_path / "two", **settings))
    assert shown.count("saved in") == shown.count("report: ") == 1  # only one process prints
    assert "on 2 x cpu" in shown
    assert [path.name for path in (tmp_path / "two").glob("*report*")] == ["report.html"]
    assert "<tr><th>processes</th><td>2</td></tr>" in (tmp_path / "two/report.html").read_text()
    assert_same_run(tmp_path / "two", one_process)


@pytest.mark.slow
def test_sharded_checkpoints_resume_with_any_number_of_processes(byte_model, text_folder, tmp_path, one_process):
    """Two processes up to the first checkpoint; then one, and four."""
    sharded = SETTINGS | FSDP | {"gradient_accumulation_steps": 1, "resume_from_checkpoint": "auto"}
    output = tmp_path / "two"
    torchrun(2, words_for(byte_model, text_folder, output, **sharded, per_device_train_batch_size=8))
    assert_same_run(output, one_process)
    checkpoint = output / "checkpoint-2"
    assert (checkpoint / "pytorch_model_fsdp_0/__1_0.distcp").exists()
    for processes, batch in ((1, 16), (4, 4)):
        other = tmp_path / f"resumed-{processes}"
        words = words_for(
            byte_model,
            text_folder,
            other,
            **sharded | {"resume_from_checkpoint": checkpoint},
            per_device_train_batch_size=batch,
        )
        shown = torchrun(processes, words)
        assert "step 3/4" in shown
        assert "step 2/4" not in shown
        assert_same_run(other, one_process)


@pytest.mark.slow
def test_whole_checkpoints_of_sharded_runs_resume(byte_model, text_folder, tmp_path, one_process):
    sharded = SETTINGS | {"fsdp": "true", "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    first, resumed = tmp_path / "first", tmp_path / "resumed"
    torchrun(2, words_for(byte_model, text_folder, first, **sharded))
    assert_same_run(first, one_process)
    checkpoint = first / "checkpoint-2"
    assert load_model(checkpoint).state_dict().keys() == load_model(first).state_dict().keys()
    shown = torchrun(2, words_for(byte_model, text_folder, resumed, **sharded, resume_from_checkpoint=checkpoint))
    assert "step 3/4" in shown
    assert "step 2/4" not in shown
    assert_same_run(resumed, one_process)


@pytest.mark.slow
def test_lanes_stay_with_their_process(byte_model, text_folder, tmp_path, console):
    settings = SETTINGS | {"carry_state": True, "gradient_accumulation_steps": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipe_for(byte_model, text_folder, one, **settings, per_device_train_batch_size=8), console)
    torchrun(2, words_for(byte_model, text_folder, two, **settings, per_device_train_batch_size=4))
    assert_same_run(two, one)
    assert {path.name for path in (two / "checkpoint-4").glob("lanes-*")} == {
        "lanes-0.safetensors",
        "lanes-1.safetensors",
    }
