"""The recipes of DPO and GRPO: margins and rewards rise on texts of the standard library."""

from __future__ import annotations

import runpy

import pytest

from tests.paths import ROOT
from tests.small_models import hf_model

pytest.importorskip("trl")


def run(name: str, *arguments, **options):
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["main"](*arguments, **options)


@pytest.fixture
def directory(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf_model(init="paper").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.slow
def test_docstrings_are_preferred_on_functions_that_training_has_not_seen(directory, tmp_path):
    before, after = run("dpo", directory, str(tmp_path / "out"), steps=20, learning_rate=1e-2)
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert after["eval_rewards/margins"] > 1
    assert after["eval_rewards/accuracies"] > 0.8


@pytest.mark.slow
def test_the_reward_of_continuations_rises(directory, tmp_path):
    first, last = run("grpo", directory, str(tmp_path / "out"), steps=24, learning_rate=1e-2)
    assert last > first + 0.05


def test_the_texts_of_both_are_many_and_real():
    pairs = runpy.run_path(str(ROOT / "recipes" / "dpo.py"))
    found = pairs["functions"]("a*.py")
    assert len(found) > 20
    prompt, docstring, code = found[0]
    assert prompt.startswith("def ")
    assert docstring[:3] == docstring[-3:] == '"""'
    assert code
    assert '"""' not in code
    rewards = runpy.run_path(str(ROOT / "recipes" / "grpo.py"))
    assert rewards["prose"](["ab c", "AB12", ""]) == [1.0, 0.0, 0.0]
    assert all(text.startswith("# ") for text in rewards["prompts"]("a*.py")["prompt"])
