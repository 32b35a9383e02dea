"""Small runs: a byte model with dropout, a folder of texts, one thread."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from retnet.train.recipe import Recipe, load_recipe
from retnet.train.throughput import Peak

# 283 rows of 48 tokens: an epoch is 18 steps of 16 rows.
SETTINGS: dict[str, Any] = {
    "length": 48,
    "valid_fraction": 0.2,
    "max_steps": 24,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_samples": 0,
    "do_eval": False,
}


@pytest.fixture(autouse=True)
def one_thread():
    """The order of summation is then the same in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def fixed_peak():
    """Every run measures its device for half a second otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retnet.train.trainer.device_peak", lambda device, dtype: Peak(1e12, "a fixed rate"))
        yield


@pytest.fixture(scope="session")
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 texts of 10 to 200 bytes: rows hold several documents, and documents go over their ends."""
    folder, rng = tmp_path_factory.mktemp("data") / "short", random.Random(0)
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text("".join(rng.choices("abcde ", k=rng.randint(10, 200))))
    return folder


@pytest.fixture(autouse=True)
def no_curve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Runs draw no loss curve, which takes a third of a small one; a test that uses the fixture `curve` gets it."""
    if "curve" not in request.fixturenames:
        monkeypatch.setattr("retnet.train.finish._draw_curve", lambda *arguments: None)


@pytest.fixture
def curve() -> None:
    """Runs of this test draw their loss curve."""


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def words_for(model: Path, data: Path | str, output: Path, **settings: Any) -> list[str]:
    """The command-line arguments of a small run."""
    values = SETTINGS | settings | {"model": model, "data": data, "output_dir": output}
    return [f"{key}={value}" for key, value in values.items()]


def recipe_for(model: Path, data: Path | str, output: Path, **settings: Any) -> Recipe:
    return load_recipe(None, words_for(model, data, output, **settings))


def losses(output: Path) -> dict[int, float]:
    """The logged losses of a finished run, by step."""
    log = json.loads((output / "training.json").read_text())["log"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()
