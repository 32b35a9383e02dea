"""What all tests share: reproducible hypothesis runs, and no GPU test without a GPU."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def hybrid_byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same width with attention and Mamba-2 beside retention."""
    from retnet.layers.attention import AttentionConfig
    from retnet.layers.block import BlockConfig
    from retnet.layers.mamba2 import Mamba2Config
    from retnet.layers.retention import RetentionConfig
    from retnet.models.config import ModelConfig
    from retnet.models.directory import save_model
    from retnet.models.lm import LanguageModel

    mixers = (Mamba2Config(64, head_dim=16, state_dim=8), RetentionConfig(2, 32, 64), AttentionConfig(4, 2, head_dim=8))
    layers = tuple(BlockConfig(mixer, None, norm="rms") for mixer in mixers)
    directory = tmp_path_factory.mktemp("models") / "hybrid-byte-model"
    save_model(LanguageModel(ModelConfig(257, 32, layers, name="hybrid-byte-model", bos_token_id=256)), directory)
    return directory


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte model small enough to run anywhere, weights at unit gain so that its state matters."""
    from retnet.models.directory import save_model
    from retnet.models.lm import LanguageModel
    from retnet.models.presets import retnet_config

    directory = tmp_path_factory.mktemp("models") / "byte-model"
    config = retnet_config("byte-model", 2, 32, 2, vocab_size=257, bos_token_id=256)
    save_model(LanguageModel(config), directory)
    return directory


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A folder of 30 small texts that repeat a few words."""
    rng = random.Random(0)
    words = ["state", "decay", "query", "key", "value", "chunk", "token"]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(20, 200))))
    return folder
