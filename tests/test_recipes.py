"""Every shipped recipe is one that `retnet train` takes, for a model that can be built."""

from pathlib import Path

import pytest

from retnet.models.cost import parameter_counts
from retnet.stack.resolve import resolve_config
from retnet.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SAVED = "out/"  # models that another recipe trains first


@pytest.fixture(autouse=True)
def at_a_fresh_root(monkeypatch, tmp_path):
    """Recipes name files from the root; what runs have left there does not count."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_is_complete(file):
    recipe = load_recipe(file)
    settings = recipe.training | {"bf16": False}  # which needs the hardware that the recipe is for
    assert recipe.model_copy(update={"training": settings}).training_arguments().max_steps != 0
    if not recipe.model.startswith(SAVED):
        assert resolve_config(recipe.model).layers


def test_a_recipe_is_named_for_its_model_data_and_hardware():
    for file in RECIPES:
        assert len(file.stem.split("_")) == 3, file
        assert load_recipe(file).training["output_dir"].startswith(SAVED)


def test_the_models_that_are_compared_have_equal_parameters():
    compared = [load_recipe(file) for file in RECIPES if "enwiki2015" in file.stem]
    counts = [parameter_counts(resolve_config(recipe.model))["total"] for recipe in compared]
    assert len(counts) == 3
    assert max(counts) / min(counts) < 1.001
    own = {"output_dir": "", "learning_rate": 0}  # each at the best rate that was found for it
    settings = [{**recipe.training, **own} for recipe in compared]
    assert all(s == settings[0] for s in settings)
    assert len({(recipe.data, recipe.valid, recipe.length) for recipe in compared}) == 1
