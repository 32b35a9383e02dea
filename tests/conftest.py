"""Fixtures of all tests: reproducible hypothesis runs, GPU tests skipped without a GPU, small models, texts."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Hides the modules that collection imports from the garbage collector.

    They are nearly a million objects that live to the end, and it would visit them during the imports and at every
    `gc.collect()` of a test.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # for what extensions report of their objects at the end of the process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def quick_peak() -> Generator[None]:
    """Training measures the rate of a CPU for half a second per run otherwise."""
    module = "retnet.train.throughput"  # imported only where a test module of this session imports it
    with pytest.MonkeyPatch.context() as patch:
        if module in sys.modules:
            patch.setattr(f"{module}._PRODUCT_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def hybrid_byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte model of every mixer that the engine serves, as initialised."""
    return _saved(tmp_path_factory, "hybrid-byte-model", "hybrid")


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte model of the paper's architecture, as initialised."""
    return _saved(tmp_path_factory, "byte-model", "retention")


@pytest.fixture(scope="session")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The byte model with dropout, whose training depends on the random state."""
    from tests.small_models import PAPER

    return _saved(tmp_path_factory, "dropout-model", [replace(PAPER, dropout=0.1)] * 2)


def _saved(tmp_path_factory: pytest.TempPathFactory, name: str, stack: Any) -> Path:
    from retnet.models.directory import save_model
    from tests.small_models import BYTES, small_model

    directory = tmp_path_factory.mktemp("models") / name
    save_model(small_model(stack, **BYTES, name=name, init="paper", tie_embeddings=True), directory)
    return directory


@pytest.fixture(scope="session")
def small() -> Any:
    """Two layers of retention in memory. Tests do not change it."""
    from tests.small_models import small_model

    return small_model()


@pytest.fixture(scope="session")
def hybrid() -> Any:
    """Every mixer that the engine serves, in memory. Tests do not change it."""
    from tests.small_models import small_model

    return small_model("hybrid")


@pytest.fixture(params=["retention", "gated", "hybrid"], scope="session")
def any_model(request: pytest.FixtureRequest) -> Any:
    from tests.small_models import small_model

    return small_model(request.param)


@pytest.fixture(scope="session")
def shared_text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 small texts that repeat a few words. Tests do not change it."""
    rng = random.Random(0)
    words = ["state", "decay", "query", "key", "value", "chunk", "token"]
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(20, 200))))
    return folder


@pytest.fixture
def text_folder(shared_text_folder: Path, tmp_path: Path) -> Path:
    """A test's own copy of `shared_text_folder`."""
    return shutil.copytree(shared_text_folder, tmp_path / "texts")
