"""Small models whose states matter, and what one request gives alone."""

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.presets import retnet_config

VOCAB = 61


def small_model(dtype: str = "float32", **options) -> LanguageModel:
    return unit_gain(LanguageModel(retnet_config("small", 2, 32, 2, vocab_size=VOCAB, dtype=dtype, **options)))


def hybrid_model(dtype: str = "float32") -> LanguageModel:
    feed_forward = FeedForwardConfig(32, gated=True, activation="swish")
    layers = (
        BlockConfig(RetentionConfig(2, 16, 32), feed_forward),
        BlockConfig(AttentionConfig(4, 2, head_dim=8, window=16), feed_forward, norm="rms"),
        BlockConfig(Mamba2Config(32, head_dim=8, state_dim=4), None, norm="rms"),
        BlockConfig(Mamba1Config(32, time_step_rank=2), None),
        BlockConfig(AttentionConfig(2, 1, head_dim=8), feed_forward),
    )
    return unit_gain(LanguageModel(ModelConfig(VOCAB, 16, layers, init="normal", init_std=0.3, dtype=dtype)))


def unit_gain(model: LanguageModel) -> LanguageModel:
    """With embeddings far apart: near an initial 0, a broken state would pass."""
    with torch.no_grad():
        model.embedding.weight.copy_(
            torch.randn(model.embedding.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    return model.eval()


@pytest.fixture(scope="session")
def small() -> LanguageModel:
    return small_model()


@pytest.fixture(scope="session")
def hybrid() -> LanguageModel:
    return hybrid_model()


@pytest.fixture(params=["retention", "gated", "hybrid"], scope="session")
def any_model(request) -> LanguageModel:
    if request.param == "hybrid":
        return hybrid_model()
    if request.param == "gated":
        return unit_gain(LanguageModel(retnet_config("gated", 2, 32, 2, gated=True, vocab_size=VOCAB)))
    return small_model()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
