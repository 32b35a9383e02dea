"""Initial weights: the distribution of each role, measured in a model wide enough to measure it."""

import math

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixers import MIXERS
from retnet.layers.moe import MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.init import INIT
from retnet.models.lm import LanguageModel

D = 128
LAYERS = (
    BlockConfig(RetentionConfig(2, D, 2 * D), FeedForwardConfig(2 * D, gated=True)),
    BlockConfig(RetentionConfig(2, D, 2 * D, decay="gated"), FeedForwardConfig(2 * D)),
    BlockConfig(AttentionConfig(4, 2, head_dim=32), MoEConfig(4, 2, D)),
    BlockConfig(Mamba2Config(2 * D, head_dim=32, state_dim=16), None),
)
WEIGHT_ROLES = {
    "mixer.q_proj": "query_key",
    "mixer.k_proj": "query_key",
    "mixer.v_proj": "value",
    "mixer.gate_proj": "value",
    "mixer.in_proj": "value",
    "mixer.out_proj": "output",
    "mixer.decay_proj": "other",
    "feed_forward.gate_proj": "feed_forward",
    "feed_forward.up_proj": "feed_forward",
    "feed_forward.down_proj": "down",
    "feed_forward.router": "other",
}


def weights(init: str) -> dict[str, torch.Tensor]:
    """Matrices of the layers, without the index of their layer, by name; one entry per matrix."""
    model = LanguageModel(ModelConfig(61, D, LAYERS, init=init))
    return {name: x for name, x in model.layers.named_parameters() if x.dim() > 1 and "conv" not in name}


@pytest.mark.parametrize("init", INIT)
def test_each_part_has_its_gain(init):
    """DeepNet's (8 L)^(-1/4) for values, gates, outputs and feed-forwards; torchscale's table beside it."""
    seen = set()
    for name, weight in weights(init).items():
        part = WEIGHT_ROLES[name.removesuffix(".weight").partition(".")[2]]
        fan_out, fan_in = weight.shape[-2:]
        bound = INIT[init][part](len(LAYERS)) * math.sqrt(6 / (fan_in + fan_out))
        assert float(weight.detach().abs().max()) == pytest.approx(bound, rel=0.03), name
        seen.add(part)
    assert seen == set(INIT[init])


def test_the_gains_are_those_of_the_sources():
    """DeepNet for decoders: beta = (8 L)^(-1/4) for values, outputs and feed-forwards, 1 for queries and keys."""
    for part, gain in INIT["paper"].items():
        expected = 1.0 if part in ("query_key", "other") else (8 * 12) ** -0.25
        assert gain(12) == pytest.approx(expected), part


def test_torchscales_gains_are_those_of_its_code():
    """2^-2.5 for q, k, v and gate, 2^-1 for the output; PyTorch's own for a feed-forward as wide as the model."""
    square, scaled = math.sqrt((D + D) / 6 / D), (2 * 12) ** -0.5  # Linear's bound is fan_in^(-1/2)
    expected = {"query_key": 2**-2.5, "value": 2**-2.5, "output": 0.5 * scaled, "feed_forward": square}
    expected |= {"down": square * scaled, "other": 1.0}
    assert {part: gain(12) for part, gain in INIT["torchscale"].items()} == pytest.approx(expected)


def test_the_normal_init_scales_what_writes_to_the_residual_stream():
    for name, weight in weights("normal").items():
        part = WEIGHT_ROLES[name.removesuffix(".weight").partition(".")[2]]
        depth = math.sqrt(2 * len(LAYERS)) if part in ("output", "down") else 1
        assert float(weight.detach().std()) == pytest.approx(0.02 / depth, rel=0.1), name


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_the_parts_that_a_mixer_names_are_parts_of_the_table(mixer):
    assert set(mixer.module.WEIGHT_ROLES.values()) <= set(INIT["paper"])


def test_a_model_without_memory_may_have_any_number_of_experts():
    layer = BlockConfig(RetentionConfig(2, 16, 16), MoEConfig(num_experts=2**40, top_k=2, hidden_dim=16))
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(64, 16, (layer,)))
    assert model.layers[0].feed_forward.up_proj.weight.shape == (2**40, 16, 16)
