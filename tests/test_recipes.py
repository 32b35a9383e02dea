"""Every shipped recipe is one that `retnet train` takes."""

from pathlib import Path

import pytest

from retnet.stack.resolve import resolve_config
from retnet.train.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_is_complete(file):
    recipe = load_recipe(file)
    assert recipe.training_arguments().max_steps != 0
    assert resolve_config(recipe.model).layers


def test_there_are_recipes():
    assert RECIPES
