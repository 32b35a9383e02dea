"""Every shipped recipe is valid for `retnet train`, and its model can be built."""

import json

import pytest
import yaml

from retnet.models.cost import parameter_counts
from retnet.stack.resolve import resolve_config
from retnet.train.recipe import load_recipe
from tests.cli.command import wrong_input
from tests.paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SAVED = "out/"  # folder of models that other recipes train


@pytest.fixture(autouse=True)
def at_a_fresh_root(monkeypatch, tmp_path):
    """Paths in recipes are relative to the root. Use a root without the output of earlier runs."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_valid_and_its_model_resolves(file):
    recipe = load_recipe(file)
    settings = recipe.training | {"bf16": False}  # bf16 may need other hardware than this
    assert recipe.model_copy(update={"training": settings}).training_arguments().max_steps != 0
    if not recipe.model.startswith(SAVED):
        assert resolve_config(recipe.model).layers


def test_a_recipe_name_has_model_data_and_hardware():
    for file in RECIPES:
        assert len(file.stem.split("_")) == 3, file
        assert load_recipe(file).training["output_dir"].startswith(SAVED)


def test_the_wikipedia_recipes_have_equal_parameters_and_settings():
    compared = [load_recipe(file) for file in RECIPES if "_enwiki2015_" in file.stem]
    counts = [parameter_counts(resolve_config(recipe.model))["total"] for recipe in compared]
    assert len(counts) == 3
    assert max(counts) / min(counts) < 1.001
    own = {"output_dir": "", "learning_rate": 0}  # each recipe has its own best learning rate
    settings = [{**recipe.training, **own} for recipe in compared]
    assert all(s == settings[0] for s in settings)
    assert len({(recipe.data, recipe.valid, recipe.length) for recipe in compared}) == 1


def serve_arguments() -> dict[str, list[str]]:
    """The command lines of `retnet serve` in the container's file and in the manifest."""
    folder = ROOT / "recipes" / "serve"
    command = next(line for line in (folder / "Dockerfile").read_text().splitlines() if line.startswith("CMD "))
    pods = [d for d in yaml.safe_load_all((folder / "kubernetes.yaml").read_text()) if d["kind"] == "Deployment"]
    (container,) = pods[0]["spec"]["template"]["spec"]["containers"]
    return {"Dockerfile": json.loads(command.removeprefix("CMD ")), "kubernetes.yaml": container["args"]}


@pytest.mark.parametrize("file", ["Dockerfile", "kubernetes.yaml"])
def test_the_server_takes_the_options_of_its_recipes(file, tmp_path, capsys):
    """Up to the key file, which is not on this machine."""
    words = [word.replace("/state", str(tmp_path)) for word in serve_arguments()[file][1:]]
    message = wrong_input(capsys, "serve", "retnet-tiny", *words, "--port", 0)
    assert "No such file or directory" in message
    assert "/keys" in message


def test_the_manifest_waits_longer_than_the_server_s_grace():
    (manifest,) = [
        d
        for d in yaml.safe_load_all((ROOT / "recipes" / "serve" / "kubernetes.yaml").read_text())
        if d["kind"] == "Deployment"
    ]
    grace = next(int(a.split("=")[1]) for a in serve_arguments()["kubernetes.yaml"] if a.startswith("--grace="))
    assert manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > grace
