"""Small models whose states matter, and what one request gives alone."""

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.moe import MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.presets import retnet_config

VOCAB = 61


# Far from the usual small initial weights and with a head of its own: the next token hangs on the state, so that a
# broken state cannot pass.
STRONG = {"init": "normal", "init_std": 0.3, "tie_embeddings": False}


def small_model(dtype: str = "float32", **options) -> LanguageModel:
    options = {**STRONG, "vocab_size": VOCAB, "dtype": dtype, **options}
    return LanguageModel(retnet_config("small", 2, 32, 2, **options)).eval()


def hybrid_model(dtype: str = "float32") -> LanguageModel:
    feed_forward = FeedForwardConfig(32, gated=True, activation="swish")
    layers = (
        BlockConfig(RetentionConfig(2, 16, 32), feed_forward),
        BlockConfig(AttentionConfig(4, 2, head_dim=8, window=16), feed_forward, norm="rms"),
        BlockConfig(Mamba2Config(32, head_dim=8, state_dim=4), None, norm="rms"),
        BlockConfig(Mamba1Config(32, time_step_rank=2), None),
        BlockConfig(AttentionConfig(2, 1, head_dim=8, rotary="none", alibi=True), feed_forward),
    )
    return LanguageModel(ModelConfig(VOCAB, 16, layers, dtype=dtype, **STRONG)).eval()


def moe_model(dtype: str = "float32") -> LanguageModel:
    experts = MoEConfig(num_experts=4, hidden_dim=16, top_k=2)
    layers = (
        BlockConfig(RetentionConfig(2, 16, 32), experts),
        BlockConfig(AttentionConfig(4, 2, head_dim=8, window=16), experts, norm="rms"),
    )
    return LanguageModel(ModelConfig(VOCAB, 16, layers, dtype=dtype, **STRONG)).eval()


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
        return small_model(gated=True)
    return small_model()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
