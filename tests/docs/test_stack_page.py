"""The numbers on the page of stacks about its complete file and the presets; the file trains with the line there."""

from __future__ import annotations

import pytest

from retnet.models.cost import parameter_counts
from retnet.stack import load_stack
from retnet.stack.build import model_config
from retnet.stack.presets import preset_names
from tests.cli.command import run
from tests.paths import ROOT

PAGE = (ROOT / "docs/reference/stack.md").read_text()
FILE = ROOT / "examples/hybrid.yml"


def test_the_example_has_the_parameters_that_the_page_says():
    total = parameter_counts(model_config(load_stack(str(FILE))))["total"]
    assert f"a hybrid of {total / 1e6:.1f} million parameters" in PAGE
    assert f"{total / 1e6:.1f} million parameters" in FILE.read_text()


def test_the_page_counts_the_presets():
    assert f"shows {len(preset_names())} of them" in PAGE
    assert all(name.removesuffix("_mini") in preset_names() for name in preset_names())


@pytest.mark.slow
def test_the_example_trains_with_the_line_on_the_page(tmp_path, monkeypatch, capsys):
    line = next(line for line in PAGE.splitlines() if line.startswith("retnet train model=examples/hybrid.yml"))
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcd":
        (texts / name).write_text("for x in range(10): print(x)\n" * 20)
    settings = dict(word.split("=") for word in line.split()[2:])
    settings |= {"model": str(FILE), "data": "texts", "length": "32", "max_steps": "2", "eval_steps": "1"}
    assert run("train", *(f"{key}={value}" for key, value in settings.items())) == 0
    assert (tmp_path / "out/hybrid/loss_curve.png").exists()
    assert run("generate", "out/hybrid", "def ", "--max-tokens", 5) == 0
