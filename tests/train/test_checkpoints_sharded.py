"""Sharded checkpoints of one process: exact, written in the background, never unpickled."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import StateDictType

from retnet.models.directory import load_model
from retnet.models.shards import SHARDS_FILE
from retnet.train.checkpoints import MARKER, STAGING, CheckpointError, choose, commit, inspect, staged
from retnet.train.run import train
from retnet.train.shard_storage import ShardWriter
from retnet.train.sharded_trainer import STATE, _form
from retnet.train.trainer import PackedTrainer

from .conftest import losses, recipe_for, weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 1}
PICKLES = [
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
    "pytorch_model.bin", "pytorch_model_fsdp.bin", "optimizer.bin", ".metadata", "__0_0.distcp",
]  # fmt: skip
ASYNC = SAVING | {"checkpoints": "async", "save_total_limit": 0}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def payload(tmp_path) -> tuple[bytes, Path]:
    """A pickle, and the path that exists once it has been executed."""
    executed, data = tmp_path / "executed", pickle.dumps(Payload(tmp_path / "executed"))
    pickle.loads(data)
    executed.rmdir()
    return data, executed


@pytest.fixture
def slow_write(monkeypatch):
    """Checkpoint 2 is written only after step 3; returns the folders that were complete in the middle of that step."""
    write, step, go_on, seen = ShardWriter._write_file, PackedTrainer.training_step, threading.Event(), []

    def write_file(self, *args):
        assert self.folder.name != "checkpoint-2" or go_on.wait(60)
        return write(self, *args)

    def training_step(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 2:  # of the step before
            output = Path(self.args.output_dir)
            seen.extend(path.name for path in output.iterdir() if path.is_dir())
            go_on.set()
        return loss

    monkeypatch.setattr(ShardWriter, "_write_file", write_file)
    monkeypatch.setattr(PackedTrainer, "training_step", training_step)
    return seen


def test_training_goes_on_while_a_checkpoint_is_written_and_resumes_exactly_without_unpickling(
    dropout_model, text_folder, tmp_path, console, slow_write, payload, monkeypatch
):
    """Pickles of every name that transformers and accelerate know lie in the checkpoint, and are not read."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe_for(dropout_model, text_folder, whole, **ASYNC), console)
    assert slow_write == [STAGING]
    monkeypatch.undo()
    checkpoint = whole / "checkpoint-2"
    assert {file.suffix for file in checkpoint.iterdir()} == {".json", ".safetensors", ".py"}
    assert load_model(checkpoint).state_dict().keys() == load_model(whole).state_dict().keys()

    data, executed = payload
    for name in PICKLES:
        (checkpoint / name).write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
        patch.setattr("retnet.train.finish._draw_curve", lambda *arguments: None)
        train(recipe_for(dropout_model, text_folder, resumed, **SAVING, resume_from_checkpoint=checkpoint), console)
    assert not executed.exists()
    assert losses(resumed) == losses(whole)
    assert weights(resumed) == weights(whole)
    assert (resumed / "checkpoint-4/optimizer.pt").exists(), "a resumed run may change the form of its checkpoints"


def test_an_index_that_torch_would_unpickle_is_refused_by_name(tmp_path, payload):
    with staged(tmp_path, "checkpoint-2") as folder:
        (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
        (folder / "pytorch_model_fsdp_0/.metadata").write_bytes(payload[0])
        checkpoint = commit(folder)
    problem = inspect(checkpoint.path).problem
    assert problem == "its pytorch_model_fsdp_0/.metadata is a pickle, which is not read"
    with pytest.raises(CheckpointError, match="is a pickle, which is not read"):
        choose(tmp_path)
    assert not payload[1].exists()


@pytest.mark.parametrize("name", ["../checkpoint-1/a", "/etc/passwd", "a/../../b"])
def test_a_marker_that_names_files_outside_of_the_checkpoint_is_refused(tmp_path, name):
    with staged(tmp_path, "checkpoint-2") as folder:
        folder.mkdir()
        (folder / "a").write_text("a")
        path = commit(folder).path
    marker = path / "complete.json"
    marker.write_text(marker.read_text().replace('"a"', f'"{name}"'))
    assert inspect(path).problem == f"its complete.json names {name!r}, which is outside of it"


def test_fsdp_asked_for_sharded_states_gets_ours_and_never_accelerates_own():
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT, fsdp_version=2)
    plugin.set_state_dict_type = lambda kind: setattr(plugin, "state_dict_type", StateDictType[kind])
    with pytest.raises(ValueError, match="checkpoints is 'whole' and fsdp_config has SHARDED_STATE_DICT"):
        _form("whole", plugin)
    assert _form(None, plugin) == "sharded"
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert (_form(None, plugin), _form("async", plugin), _form(None, None)) == ("whole", "async", "whole")
    plugin.fsdp_version = 1
    with pytest.raises(ValueError, match="checkpoints is 'async' with FSDP1; accepted: FSDP2, or 'whole'"):
        _form("async", plugin)


def test_a_checkpoint_that_cannot_be_written_in_the_background_ends_the_run_and_keeps_the_old_one(
    dropout_model, text_folder, tmp_path, console, monkeypatch
):
    """Noticed after the next step, although the next checkpoint would be due later."""
    write, step, steps = ShardWriter._write_file, PackedTrainer.training_step, []

    def write_file(self, *args):
        if self.folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        return write(self, *args)

    def training_step(self, *args, **kwargs):
        steps.append(self.state.global_step + 1)
        if self.saver.pending:
            self.saver._saving.exception()  # wait for the thread
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ShardWriter, "_write_file", write_file)
    monkeypatch.setattr(PackedTrainer, "training_step", training_step)
    settings = ASYNC | {"max_steps": 9, "save_total_limit": 1}
    message = r"checkpoint-4 could not be written \(.*No space left.*iB free\): the last complete checkpoint is .*-2"
    with pytest.raises(CheckpointError, match=message):
        train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    assert steps[-1] == 5
    newest, damaged = choose(tmp_path)
    assert (newest.step, damaged) == (2, [])
    assert not (tmp_path / STAGING).exists()


def test_an_optimizer_that_cannot_be_saved_ends_the_run_after_its_first_step(
    dropout_model, text_folder, tmp_path, console, monkeypatch
):
    original = PackedTrainer.training_step

    def training_step(self, *args, **kwargs):
        self.optimizer.param_groups[0]["hook"] = print
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "training_step", training_step)
    with pytest.raises(ValueError, match=r"the optimizer's option.hook is a builtin_function_or_method; accepted"):
        train(recipe_for(dropout_model, text_folder, tmp_path, **ASYNC | {"max_steps": 1}), console)


@pytest.mark.slow
@pytest.mark.parametrize("file", [SHARDS_FILE, STATE, "random-0.json", "shard-00000-00000.safetensors"])
def test_a_checkpoint_with_a_torn_file_and_a_marker_of_it_is_refused(
    dropout_model, text_folder, tmp_path, console, file
):
    """As by someone who knows the format: the hashes are right."""
    train(recipe_for(dropout_model, text_folder, tmp_path / "out", **ASYNC), console)
    with staged(tmp_path, "checkpoint-2") as folder:
        shutil.copytree(tmp_path / "out/checkpoint-2", folder, ignore=shutil.ignore_patterns(MARKER))
        path = folder / file
        path.write_bytes(path.read_bytes()[:-30])
        checkpoint = commit(folder).path
    recipe = recipe_for(dropout_model, text_folder, tmp_path / "other", **ASYNC, resume_from_checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=f"checkpoint-2 cannot be resumed: .*{file}"):
        train(recipe, console)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sharded", "async"])
def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(
    dropout_model, text_folder, tmp_path, console, monkeypatch, form
):
    """Validation is best at step 4, and one more checkpoint is kept."""
    settings = SAVING | {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    settings |= {"load_best_model_at_end": True, "do_eval": True}
    for each in ("whole", form):
        scores = iter([2.0, 1.0, 3.0, 4.0])
        monkeypatch.setattr(PackedTrainer, "_score", lambda self, rows, left=scores: torch.tensor([next(left), 1.0]))
        train(recipe_for(dropout_model, text_folder, tmp_path / each, **settings, checkpoints=each), console)
        assert [path.name for path in (tmp_path / each).glob("checkpoint-*")] == ["checkpoint-4"]
    assert weights(tmp_path / form) == weights(tmp_path / "whole")
