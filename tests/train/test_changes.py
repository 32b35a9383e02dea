"""Every key of a recipe, changed when a run is resumed: it has no effect, is said, or is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import pytest
from rich.console import Console
from transformers import TrainingArguments

from retnet.train.changes import FREE, REFUSED, SAID, run_facts, said_settings
from retnet.train.inputs import initial_model, open_data
from retnet.train.recipe import WITHOUT_EFFECT, Recipe
from retnet.train.run import train

from .conftest import losses, recipe_for, weights

SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def resume(model, data, output, console, **settings):
    """Resume with other settings, and return what was printed."""
    begin = len(console.file.getvalue())
    train(recipe_for(model, data, output, **SAVING | {"resume_from_checkpoint": "auto"} | settings), console)
    return console.file.getvalue()[begin:]


def test_every_key_of_a_recipe_has_one_class_and_a_refused_one_decides_a_fact(byte_model, text_folder, tmp_path):
    """Fields that newer versions of transformers add must be put into the table."""
    keys = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    keys |= set(Recipe.model_fields) - {"training"}
    classes = [FREE, SAID, REFUSED.keys()]
    counts = {key: sum(key in kind for kind in classes) for key in keys - WITHOUT_EFFECT.keys()}
    assert {key: count for key, count in counts.items() if count != 1} == {}
    assert not any(key in kind for kind in classes for key in WITHOUT_EFFECT)
    recipe = recipe_for(byte_model, text_folder, tmp_path)
    arguments = recipe.training_arguments()
    data = open_data(recipe, arguments)
    facts = run_facts(recipe, arguments, data, initial_model(recipe, data.corpus, 0))
    assert set(REFUSED.values()) <= facts.keys()
    assert said_settings(recipe, arguments).keys() == (SAID & keys) | {"processes"}
    assert "hub_token" in FREE, "a secret is neither stored nor shown"


@pytest.fixture(scope="module")
def text_folder(shared_text_folder):
    return shared_text_folder


@pytest.fixture(scope="module")
def first_run(dropout_model, text_folder, tmp_path_factory):
    """A run with checkpoints 1 and 2, which tests do not change."""
    output = tmp_path_factory.mktemp("first") / "out"
    train(recipe_for(dropout_model, text_folder, output, **SAVING), Console(file=io.StringIO()))
    return output


@pytest.fixture
def stopped(first_run, tmp_path):
    """A test's own copy of `first_run`."""
    return shutil.copytree(first_run, tmp_path / "out")


# Settings and what is said; None: nothing.
CHANGED = [
    ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was 'linear' and is 'cosine'"),
    ({"max_steps": 4}, "max_steps was 2 and is 4"),
    ({"max_grad_norm": 0.5}, "max_grad_norm was 2.0 and is 0.5"),
    ({"warmup_steps": 1}, "warmup_steps was 0.05 and is 1"),
    ({"num_train_epochs": 3}, "num_train_epochs was 1.0 and is 3.0"),
    ({"valid_rows": 4}, "valid_rows was None and is 4"),
    ({"max_minutes": 5}, "max_minutes was None and is 5.0"),
    ({"lr_scheduler_kwargs": "{num_cycles: 2}", "lr_scheduler_type": "cosine"}, "lr_scheduler_kwargs was"),
    ({"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}, None),
    ({"logging_steps": 2, "save_steps": 2, "num_samples": 1, "do_eval": True, "save_total_limit": 9}, None),
    ({"data_seed": 0}, None),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}, None),
]


@pytest.mark.parametrize(("settings", "said"), CHANGED, ids=str)
def test_a_change_that_applies_is_said_in_one_line_and_a_free_one_is_not(
    dropout_model, text_folder, stopped, console, settings, said
):
    shown = resume(dropout_model, text_folder, stopped, console, **settings)
    lines = [line for line in shown.splitlines() if line.startswith("changed: ")]
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


REFUSALS = [
    ({"length": 32, "gradient_accumulation_steps": 1}, "length was 48 and is 32; rows_per_step was 16 and is 8"),
    ({"gradient_accumulation_steps": 1}, "rows_per_step was 16 and is 8"),
    ({"seed": 1}, "data_seed was 0 and is 1"),
    ({"data_seed": 1}, "data_seed was 0 and is 1"),
    ({"carry_state": True}, "carry_state was False and is True"),
    ({"valid_fraction": 0.4}, "data was .*: other documents, or another split of them"),
    ({"learning_rate": 1e-4}, "learning_rate was 0.01 and is 0.0001"),
    ({"router_lr_multiplier": 0.5}, "router_lr_multiplier was 1.0 and is 0.5"),
    ({"optim": "sgd"}, "optim was 'adamw_torch_fused' and is 'sgd'"),
    ({"optim_args": "a=1"}, "optim_args was None and is 'a=1'"),
    ({"adam_beta1": 0.5}, "adam_beta1 was 0.9 and is 0.5"),
    ({"adam_beta2": 0.5}, "adam_beta2 was 0.98 and is 0.5"),
    ({"adam_epsilon": 1e-6}, "adam_epsilon was 1e-08 and is 1e-06"),
    ({"weight_decay": 0.5}, "weight_decay was 0.05 and is 0.5"),
    ({"bf16": True}, "bf16 was False and is True"),
    (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        "schedule was 'a function of the step' and is ",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS, ids=str)
def test_a_change_that_a_checkpoint_cannot_follow_is_refused_with_what_to_do(
    dropout_model, text_folder, stopped, console, settings, message
):
    before = weights(stopped)
    with pytest.raises(ValueError, match=rf"is of another run: .*{message}.*Accepted: the same, or model=.*to start"):
        resume(dropout_model, text_folder, stopped, console, **settings)
    assert weights(stopped) == before


def test_another_model_is_refused_with_the_fields_that_differ(byte_model, text_folder, stopped, console):
    """The byte model is the dropout model without dropout."""
    with pytest.raises(ValueError, match=r"model.layers\[0\].layer.dropout was 0.1 and is 0.0"):
        resume(byte_model, text_folder, stopped, console)


def test_sources_in_another_order_are_refused_and_equal_shares_are_accepted(byte_model, text_folder, tmp_path, console):
    other = tmp_path / "others"
    other.mkdir()
    for i in range(8):
        (other / f"{i}.txt").write_text("numbers 1 2 3 4 5 6 7 8 9 " * (i + 3))
    train(recipe_for(byte_model, f"{{{text_folder}: 1, {other}: 1}}", tmp_path / "out", **SAVING), console)
    resume(byte_model, f"{{{text_folder}: .5, {other}: .5}}", tmp_path / "out", console)
    link = tmp_path / "link"
    link.symlink_to(other)
    resume(byte_model, f"{{{text_folder}: 2, {link}: 2}}", tmp_path / "out", console)
    for data, reason in (
        (f"{{{other}: 1, {text_folder}: 1}}", "another order of sources reads other rows"),
        (f"{{{text_folder}: 2, {other}: 1}}", "other shares"),
        (text_folder, "other documents"),
    ):
        with pytest.raises(ValueError, match=rf"data was .*texts \(0.5\), .*others \(0.5\) and is .*: {reason}"):
            resume(byte_model, data, tmp_path / "out", console)


def test_a_changed_schedule_applies_from_the_next_step(dropout_model, text_folder, stopped, console):
    resume(dropout_model, text_folder, stopped, console, max_steps=4, lr_scheduler_type="constant", warmup_steps=0)
    log = json.loads((stopped / "training.json").read_text())["log"]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    assert (rates[3], rates[4]) == (0.01, 0.01)


def test_how_often_a_resumed_run_logs_saves_and_validates_is_the_new_setting(
    dropout_model, text_folder, stopped, console
):
    settings = {"logging_steps": 3, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 5, "max_steps": 10}
    resume(dropout_model, text_folder, stopped, console, **settings, save_total_limit=9)
    log = json.loads((stopped / "training.json").read_text())["log"]
    assert [step for step in losses(stopped) if step > 2] == [3, 6, 9]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [5, 10]
    assert {path.name for path in stopped.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 4, 8, 10)}
