"""Checkpoint folders: complete or absent, damaged ones reported, the last good one kept."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from retnet.train import checkpoints
from retnet.train.checkpoints import (
    MARKER,
    STAGING,
    CheckpointError,
    choose,
    commit,
    inspect,
    list_checkpoints,
    publish,
    rotate,
    staged,
)
from retnet.train.run import train
from retnet.train.trainer import PackedTrainer

from .conftest import recipe_for, words_for

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 1}


def save(output, step, **files):
    with staged(output, f"checkpoint-{step}") as folder:
        (folder / "shard").mkdir(parents=True)
        for name, text in ({"a": "weights", "shard/b": "optimizer"} | files).items():
            (folder / name).write_text(text)
        return commit(folder)


def steps(checkpoints):
    return [checkpoint.step for checkpoint in checkpoints]


def test_the_last_saved_checkpoint_is_chosen_and_no_other_file_remains(tmp_path):
    assert choose(tmp_path) == (None, [])
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    newest, damaged = choose(tmp_path)
    assert newest == last
    assert (newest.path, damaged) == (tmp_path / "checkpoint-20", [])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-20"}


def test_the_newest_checkpoint_is_the_last_saved_not_the_highest_step(tmp_path):
    for step in (10, 20, 15):
        save(tmp_path, step)
    assert choose(tmp_path)[0].step == 15
    rotate(tmp_path, 1)
    assert steps(list_checkpoints(tmp_path)) == [15]


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 10, a="other weights")
    assert (choose(tmp_path)[0].path / "a").read_text() == "other weights"


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    flushed, final = [], tmp_path / "checkpoint-10"
    monkeypatch.setattr(checkpoints, "flush", lambda path: flushed.append((path.name, final.exists())))
    save(tmp_path, 10)
    before = {name for name, has_name in flushed if not has_name}
    assert {"a", "b", "shard", "checkpoint-10"} <= before
    assert flushed[-1] == (tmp_path.name, True)


def test_an_interrupted_removal_leaves_no_partial_checkpoint_under_its_name(tmp_path, monkeypatch):
    save(tmp_path, 10)
    save(tmp_path, 20)
    remove_tree = shutil.rmtree

    def interrupted(path, **options):
        if path.exists() and "checkpoint-10" in path.name:
            (path / "a").unlink()
            raise KeyboardInterrupt
        remove_tree(path, **options)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    assert steps(list_checkpoints(tmp_path)) == [20]


def truncate(path):
    (path / "a").write_text("weig")


def flip(path):
    (path / "shard/b").write_text("optimiser")


def remove(path):
    (path / "shard/b").unlink()


def unmark(path):
    (path / MARKER).unlink()


def garble(path):
    (path / MARKER).write_text('{"files":')


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "a has 4 bytes, not 7"),
        (flip, "shard/b has changed since it was written: its hash differs"),
        (remove, "shard/b is missing"),
        (unmark, "it has no complete.json: saving did not finish"),
        (garble, "its complete.json cannot be read: "),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_skipped(tmp_path, damage, problem):
    save(tmp_path, 10)
    damage(save(tmp_path, 20).path)
    newest, damaged = choose(tmp_path)
    assert newest.step == 10
    (skipped,) = damaged
    assert skipped.step == 20
    assert skipped.problem.startswith(problem)
    damage(tmp_path / "checkpoint-10")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*checkpoint-20: .*checkpoint-10: "):
        choose(tmp_path)


def test_rotation_keeps_the_newest_complete_and_the_best_checkpoint(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    rotate(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 4
    truncate(tmp_path / "checkpoint-40")
    rotate(tmp_path, 1, best=tmp_path / "checkpoint-10")
    assert steps(list_checkpoints(tmp_path)) == [40, 10, 30]  # the damaged one is newer, and is kept for inspection
    assert inspect(tmp_path / "checkpoint-30").problem is None
    assert not (tmp_path / STAGING).exists()


def fail_in_the_middle(output):
    with staged(output, "checkpoint-20") as folder:
        folder.mkdir()
        (folder / "a").write_text("half")
        raise RuntimeError("file torn")


def test_an_error_while_saving_keeps_the_old_checkpoint_and_names_it(tmp_path):
    save(tmp_path, 10)
    message = r"checkpoint-20 could not be written \(.*torn.*\): the last complete checkpoint is .*checkpoint-10"
    with pytest.raises(CheckpointError, match=message):
        fail_in_the_middle(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10"}


def test_published_files_replace_old_ones(tmp_path):
    output, staging = tmp_path / "out", tmp_path / "out/.saving/model"
    staging.mkdir(parents=True)
    (output / "config.json").write_text("old")
    (staging / "config.json").write_text("new")
    publish(staging, output)
    assert (output / "config.json").read_text() == "new"
    assert not staging.exists()


@pytest.fixture
def small_files():
    """A function that limits the size of files in bytes; writers then fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_save_stops_the_run_and_keeps_the_old_checkpoint(
    dropout_model, text_folder, tmp_path, console, monkeypatch, small_files
):
    original = PackedTrainer._save_checkpoint

    def save_checkpoint(self, *args):
        if self.state.global_step == 4:
            small_files(4096)
        original(self, *args)

    monkeypatch.setattr(PackedTrainer, "_save_checkpoint", save_checkpoint)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 could not be written \(.*iB free\): the last complete checkpoint is .*2"
    ):
        train(recipe_for(dropout_model, text_folder, tmp_path / "out", **SAVING), console)
    newest, damaged = choose(tmp_path / "out")
    assert (newest.step, damaged) == (2, [])
    assert not (tmp_path / "out" / STAGING).exists()


def test_a_model_that_cannot_be_written_stops_the_run_without_partial_files(
    dropout_model, text_folder, tmp_path, console, monkeypatch, small_files
):
    original = PackedTrainer.save_model

    def save_model(self, *args, **kwargs):
        small_files(4096)
        original(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "save_model", save_model)
    with pytest.raises(CheckpointError, match=r"model could not be written \(.*iB free\): there is no checkpoint"):
        train(recipe_for(dropout_model, text_folder, tmp_path / "out", max_steps=2), console)
    assert not (tmp_path / "out" / STAGING).exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("text", ["[]", '{"serial": 1, "files": {"a": {"bytes": 3}}}', '{"serial": 1, "files": [1]}'])
def test_a_marker_with_other_content_is_a_damaged_checkpoint(tmp_path, text):
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "checkpoint-20" / MARKER).write_text(text)
    newest, damaged = choose(tmp_path)
    assert newest.step == 10
    assert [(c.step, "cannot be read" in c.problem) for c in damaged] == [(20, True)]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_one_message(dropout_model, text_folder, tmp_path):
    """A file system in memory with room for one checkpoint only."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=900k tmpfs {disk}"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs permission to mount a file system")
    words = words_for(dropout_model, text_folder, disk / "out", **SAVING)
    command = subprocess.list2cmdline([sys.executable, "-m", "retnet.cli", "train", *words])
    script = f"{mount} && {{ {command}; code=$?; cp -r {disk} {kept}; exit $code; }}"
    run = subprocess.run([unshare, "-rm", "sh", "-c", script], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 2, run.stderr
    assert "checkpoint-4 could not be written" in run.stderr
    assert "the last complete checkpoint is" in run.stderr
    assert "Traceback" not in run.stderr
    newest, damaged = choose(kept / "out")
    assert (newest.step, damaged) == (2, [])


def test_a_resumed_run_reports_and_skips_a_damaged_checkpoint(dropout_model, text_folder, tmp_path, console):
    train(recipe_for(dropout_model, text_folder, tmp_path, **SAVING), console)
    file = tmp_path / "checkpoint-4/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "training.json").unlink()
    train(recipe_for(dropout_model, text_folder, tmp_path, **SAVING, resume_from_checkpoint="auto"), console)
    text = console.file.getvalue()
    assert f"skipped {tmp_path / 'checkpoint-4'}: model.safetensors has" in text
    assert f"resuming from {tmp_path / 'checkpoint-2'}" in text
    log = json.loads((tmp_path / "training.json").read_text())["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]


def test_resuming_from_a_damaged_checkpoint_by_path_is_an_error(dropout_model, text_folder, tmp_path, console):
    train(recipe_for(dropout_model, text_folder, tmp_path, **SAVING), console)
    (tmp_path / "checkpoint-2/optimizer.pt").unlink()
    recipe = recipe_for(
        dropout_model, text_folder, tmp_path, **SAVING, resume_from_checkpoint=tmp_path / "checkpoint-2"
    )
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is not a complete checkpoint: optimizer.pt is missing"):
        train(recipe, console)
    for path, message in (
        (tmp_path, "is the output folder of a run; accepted: one of its checkpoints, such as .*checkpoint-4, or"),
        (tmp_path / "checkpoint-9", "is not a complete checkpoint: there is no such folder"),
    ):
        recipe = recipe_for(dropout_model, text_folder, tmp_path, **SAVING, resume_from_checkpoint=path)
        with pytest.raises(CheckpointError, match=message):
            train(recipe, console)
