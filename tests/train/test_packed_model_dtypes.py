"""Models in half precision are trained with float32 weights and saved as they came."""

from __future__ import annotations

import json

import pytest
import torch

from retnet.data import open_corpus
from retnet.models.directory import load_model, save_model
from retnet.train.inputs import initial_model
from retnet.train.recipe import load_recipe
from retnet.train.run import train
from tests.small_models import BYTES, small_model
from tests.stack.specs import changed

from .conftest import losses, recipe_for, weights

SMALL_STEPS = {
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
}
STACK = changed(("n_heads: 4", "n_heads: 4\n  dtype: bfloat16"), more="compatibility: {dtype_policy: layered_safe}\n")


@pytest.fixture(params=["stack", "float16 directory"])
def half_model(request, tmp_path):
    """A stack file of bfloat16 whose norms stay float32, or a saved model of float16."""
    if request.param == "stack":
        path = tmp_path / "half.yml"
        path.write_text(STACK)
        return path, torch.bfloat16
    save_model(small_model(**BYTES).half(), tmp_path / "half")
    return tmp_path / "half", torch.float16


def test_weights_in_half_precision_move_at_small_rates_and_are_saved_as_they_came(
    half_model, text_folder, tmp_path, console
):
    model, dtype = half_model
    recipe = recipe_for(model, text_folder, tmp_path / "out", **SMALL_STEPS, save_steps=2)
    before = initial_model(recipe, open_corpus(text_folder), 0)
    start = {name: x.clone() for name, x in before.model.state_dict().items()}
    assert {x.dtype for x in start.values()} == {torch.float32}
    train(recipe, console)
    trained = load_model(tmp_path / "out/checkpoint-2").state_dict()
    saved = load_model(tmp_path / "out")
    for name, x in saved.state_dict().items():
        moved = (trained[name] != start[name]).float().mean()
        assert trained[name].dtype == torch.float32
        if x.dim() > 1 and "embedding" not in name and name != "head.weight":
            assert moved > 0.9, name
            assert x.dtype == dtype, name
        assert x.dtype == before.final_dtypes[name], name
        assert torch.equal(x, trained[name].to(x.dtype)), name
    assert saved.config.dtype == str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        assert saved.final_norm.weight.dtype == torch.float32
    text = console.file.getvalue()
    assert "trained in float32, where small steps are not rounded away" in text
    assert f"products in {'bfloat16 (bf16)' if dtype == torch.bfloat16 else 'float32'}" in text


def test_a_resumed_run_in_half_precision_equals_an_uninterrupted_one(short_texts, tmp_path, console):
    model = tmp_path / "half.yml"
    model.write_text(STACK)
    settings = SMALL_STEPS | {"save_steps": 1, "save_total_limit": 2}
    train(recipe_for(model, short_texts, tmp_path / "whole", **settings), console)
    resumed = {**settings, "resume_from_checkpoint": tmp_path / "whole/checkpoint-1"}
    train(recipe_for(model, short_texts, tmp_path / "resumed", **resumed), console)
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")
    last = max(losses(tmp_path / "whole"))
    assert losses(tmp_path / "resumed")[last] == losses(tmp_path / "whole")[last]


def test_products_are_bfloat16_for_a_model_of_bfloat16_unless_the_user_says_otherwise(tmp_path):
    model = tmp_path / "half.yml"
    model.write_text(STACK)
    save_model(small_model(**BYTES).bfloat16(), tmp_path / "half")
    for name in (model, tmp_path / "half"):
        words = [f"model={name}", "data=x"]
        assert load_recipe(None, words).training["bf16"] is True
        assert load_recipe(None, [*words, "bf16=false"]).training["bf16"] is False
        assert "bf16" not in load_recipe(None, [*words, "fp16=true"]).training
    save_model(small_model(**BYTES), tmp_path / "single")
    assert "bf16" not in load_recipe(None, [f"model={tmp_path / 'single'}", "data=x"]).training


def test_a_model_of_float64_stays_so(text_folder, tmp_path):
    save_model(small_model(**BYTES).double(), tmp_path / "double")
    recipe = recipe_for(tmp_path / "double", text_folder, tmp_path / "out")
    model = initial_model(recipe, open_corpus(text_folder), 0)
    assert (model.dtype, model.final_dtypes) == (torch.float64, None)
    assert json.loads((tmp_path / "double/config.json").read_text())["model_config"]["dtype"] == "float64"
