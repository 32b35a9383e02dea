"""Several processes under torchrun, on gloo: the same run as with one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retnet.models.directory import load_model, save_model
from retnet.train.checkpoints import choose
from retnet.train.run import train
from tests.small_models import BYTES, small_model
from tests.torchrun import torchrun

from .conftest import losses, recipe_for, weights, words_for

KILLED_RUN = Path(__file__).with_name("killed_run.py")
SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "do_eval": True}
FSDP2 = {"fsdp": "true"}
FSDP = FSDP2 | {"fsdp_config": "{state_dict_type: SHARDED_STATE_DICT}"}  # means checkpoints=sharded


def train_on_processes(processes: int, words: list[str], killed: str | None = None) -> str:
    """The output of a run. killed: a place of `killed_run.py`, where it dies."""
    program = ["-m", "retnet.cli", "train"] if killed is None else [str(KILLED_RUN), killed]
    run = torchrun(processes, *program, *words)
    assert (run.returncode == 0) == (killed is None), run.stdout + run.stderr
    assert killed is None or "Signal 9 (SIGKILL)" in run.stderr, run.stderr
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
    shown = train_on_processes(2, words_for(byte_model, text_folder, tmp_path / "two", **settings))
    assert shown.count("saved in") == shown.count("report: ") == 1  # only one process prints
    assert "on 2 x cpu" in shown
    assert [path.name for path in (tmp_path / "two").glob("*report*")] == ["report.html"]
    assert "<tr><th>processes</th><td>2</td></tr>" in (tmp_path / "two/report.html").read_text()
    assert_same_run(tmp_path / "two", one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "saved_by", "saving", "resumed_by", "resuming"),
    [
        ("adamw_torch", 4, FSDP2 | {"checkpoints": "async"}, 2, {}),
        ("muon", 2, FSDP, 4, FSDP2),
        ("muon", 2, {"checkpoints": "async"}, 2, FSDP2 | {"checkpoints": "sharded"}),
    ],
    ids=["4 shards to 2 replicas", "2 shards to 4 shards", "2 replicas to 2 shards"],
)
def test_checkpoints_sharded_resume_with_other_processes(
    byte_model, text_folder, tmp_path, console, optim, saved_by, saving, resumed_by, resuming
):
    """Saved by several processes at step 2, with and without FSDP; resumed by others, and by one."""
    settings = SETTINGS | {"gradient_accumulation_steps": 1, "optim": optim}
    one, first = tmp_path / "one", tmp_path / "first"
    train(recipe_for(byte_model, text_folder, one, **settings, per_device_train_batch_size=16), console)
    batch = {"per_device_train_batch_size": 16 // saved_by}
    train_on_processes(saved_by, words_for(byte_model, text_folder, first, **settings | saving | batch))
    assert_same_run(first, one)
    checkpoint = first / "checkpoint-2"
    assert len(list(checkpoint.glob("shard-*.safetensors"))) == saved_by
    assert {path.suffix for path in checkpoint.rglob("*")} == {".json", ".safetensors", ".py"}, "no pickle"
    assert load_model(checkpoint).state_dict().keys() == load_model(first).state_dict().keys()
    settings |= {"resume_from_checkpoint": checkpoint}
    recipe = recipe_for(byte_model, text_folder, tmp_path / "alone", **settings, per_device_train_batch_size=16)
    train(recipe, console)
    assert_same_run(tmp_path / "alone", one)
    batch = {"per_device_train_batch_size": 16 // resumed_by}
    shown = train_on_processes(
        resumed_by, words_for(byte_model, text_folder, tmp_path / "other", **settings | resuming | batch)
    )
    assert "step 3/4" in shown
    assert "step 2/4" not in shown
    assert_same_run(tmp_path / "other", one)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, FSDP2, FSDP], ids=["ddp", "fsdp", "sharded checkpoints"])
def test_a_model_of_bfloat16_is_trained_in_float32_and_saved_as_it_came(text_folder, tmp_path, settings):
    save_model(small_model(**BYTES).bfloat16(), tmp_path / "half")
    settings = SETTINGS | settings | {"per_device_train_batch_size": 4, "learning_rate": 3e-5, "warmup_steps": 0}
    shown = train_on_processes(2, words_for(tmp_path / "half", text_folder, tmp_path / "out", **settings))
    assert shown.count("trained in float32") == 1
    before, saved = load_model(tmp_path / "half").state_dict(), load_model(tmp_path / "out").state_dict()
    trained = load_model(tmp_path / "out/checkpoint-4").state_dict()
    for name, x in saved.items():
        assert (x.dtype, trained[name].dtype) == (before[name].dtype, torch.float32), name
        assert torch.equal(x, trained[name].to(x.dtype)), name
    moved = trained["layers.0.mixer.q_proj.weight"] != before["layers.0.mixer.q_proj.weight"]
    assert moved.float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, FSDP2 | {"optim": "muon"}], ids=["ddp", "fsdp-muon"])
def test_a_run_killed_while_processes_write_in_the_background_resumes_exactly(
    dropout_model, text_folder, tmp_path, settings
):
    """One process dies with half of its shard on disk, then all, then the first one before it renames the folder."""
    settings = SETTINGS | settings | {"checkpoints": "async", "save_total_limit": 1, "per_device_train_batch_size": 8}
    settings |= {"max_steps": 8, "gradient_accumulation_steps": 1, "resume_from_checkpoint": "auto"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_on_processes(2, words_for(dropout_model, text_folder, whole, **settings))
    words = words_for(dropout_model, text_folder, killed, **settings)
    for place, last in (("write:4:1", 2), ("write:6", 4), ("commit:8:0", 6)):
        train_on_processes(2, words, killed=place)
        newest, damaged = choose(killed)
        assert newest is not None
        assert (newest.step, damaged) == (last, []), place
    train_on_processes(2, words)
    assert losses(killed) == losses(whole)
    assert weights(killed) == weights(whole)
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.slow
def test_whole_checkpoints_of_sharded_runs_resume(byte_model, text_folder, tmp_path, one_process):
    sharded = SETTINGS | {"fsdp": "true", "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    first, resumed = tmp_path / "first", tmp_path / "resumed"
    train_on_processes(2, words_for(byte_model, text_folder, first, **sharded))
    assert_same_run(first, one_process)
    checkpoint = first / "checkpoint-2"
    assert load_model(checkpoint).state_dict().keys() == load_model(first).state_dict().keys()
    shown = train_on_processes(
        2, words_for(byte_model, text_folder, resumed, **sharded, resume_from_checkpoint=checkpoint)
    )
    assert "step 3/4" in shown
    assert "step 2/4" not in shown
    assert_same_run(resumed, one_process)


@pytest.mark.slow
def test_lanes_stay_with_their_process(byte_model, text_folder, tmp_path, console):
    settings = SETTINGS | {"carry_state": True, "gradient_accumulation_steps": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipe_for(byte_model, text_folder, one, **settings, per_device_train_batch_size=8), console)
    train_on_processes(2, words_for(byte_model, text_folder, two, **settings, per_device_train_batch_size=4))
    assert_same_run(two, one)
    assert {path.name for path in (two / "checkpoint-4").glob("lanes-*")} == {
        "lanes-0.safetensors",
        "lanes-1.safetensors",
    }


@pytest.mark.slow
def test_an_error_of_the_first_process_is_one_message_of_each(byte_model, text_folder, tmp_path):
    output = tmp_path / "taken"
    output.write_text("a file in the place of the folder")
    run = torchrun(2, "-m", "retnet.cli", "train", *words_for(byte_model, text_folder, output, **SETTINGS))
    assert run.returncode != 0
    messages = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    others = [line for line in messages if "process 1 has lost the connection to another process" in line]
    assert len(others) <= 1, run.stderr  # torchrun may end that process before it prints
    assert len(messages) == 1 + len(others), run.stderr
    assert f"error: File exists: {output}" in messages, run.stderr
    assert "gloo" not in run.stderr, run.stderr
