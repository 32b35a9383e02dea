"""Small models at unit gain: at a small initialisation a broken cache would pass."""

from __future__ import annotations

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.hf import RetNetConfig, RetNetForCausalLM

VOCAB = 257
D = 32
FEED_FORWARD = FeedForwardConfig(32, gated=True, activation="swish")
STACKS = {
    "retnet": (
        BlockConfig(RetentionConfig(2, D, 2 * D), FEED_FORWARD),
        BlockConfig(RetentionConfig(2, D, 2 * D, decay="gated"), FEED_FORWARD),
    ),
    "hybrid": (
        BlockConfig(Mamba2Config(2 * D, head_dim=16, state_dim=8), None, norm="rms"),
        BlockConfig(RetentionConfig(2, D, 2 * D), FEED_FORWARD),
        BlockConfig(AttentionConfig(4, 2, head_dim=8, window=5), FEED_FORWARD),
        BlockConfig(AttentionConfig(4, 4, head_dim=8), None),
    ),
}


def make_model(stack: str = "retnet", vocab_size: int = VOCAB, **options) -> RetNetForCausalLM:
    """Untied unless asked for: a tied head at unit gain mostly says the last token again."""
    options = {"init": "normal", "init_std": D**-0.5, "tie_embeddings": False, **options}
    options = {"bos_token_id": 256 if vocab_size > 256 else None, **options}
    model = RetNetForCausalLM(RetNetConfig.of(ModelConfig(vocab_size, D, STACKS[stack], name=stack, **options)))
    with torch.no_grad():
        model.model.embedding.weight.normal_(generator=torch.Generator().manual_seed(5))
    model.generation_config.pad_token_id = 0
    return model.eval()


def random_ids(*shape: int, high: int = 256) -> torch.Tensor:
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=list(STACKS))
def model(request) -> RetNetForCausalLM:
    return make_model(request.param)


@pytest.fixture
def retnet_model() -> RetNetForCausalLM:
    return make_model()


@pytest.fixture(scope="session", params=list(STACKS))
def saved(request, tmp_path_factory) -> str:
    """A byte model with its tokenizer, as users keep one."""
    from retnet.models.hf.tokenizer import byte_tokenizer

    directory = tmp_path_factory.mktemp("hf") / "model"
    make_model(request.param, tie_embeddings=True).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)
