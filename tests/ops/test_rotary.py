"""YaRN: the frequencies and gain of transformers, and their limits for fast and slow pairs."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from retnet.ops.rotary import Yarn, frequencies, rotation


@pytest.mark.parametrize(
    ("key_dim", "base", "factor", "length"), [(128, 1e6, 4.0, 32768), (64, 1e4, 16.0, 2048), (32, 1e4, 2.0, 64)]
)
def test_half_convention_agrees_with_transformers(key_dim, base, factor, length):
    scaling = {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, "rope_theta": base,
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=key_dim,
        num_attention_heads=1,
        max_position_embeddings=int(length * factor),
        rope_parameters=scaling,
    )
    theirs, gain = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    plain = frequencies("half", key_dim, base, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(Yarn(factor, length).frequencies(plain, "half", base), theirs, rtol=2e-6, atol=0)
    assert Yarn(factor, length).gain == pytest.approx(gain)


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
def test_frequencies_of_fast_pairs_are_kept_and_of_slow_ones_divided(rotary):
    plain = frequencies(rotary, 128, 1e4, dtype=torch.float64, device=torch.device("cpu"))
    yarn = Yarn(8.0, 4096)
    ratio = plain / yarn.frequencies(plain, rotary, 1e4)
    turns = 4096 * plain / (2 * math.pi)
    assert torch.equal(ratio[turns > 40], torch.ones_like(ratio[turns > 40]))
    torch.testing.assert_close(ratio[turns < 0.8], torch.full_like(ratio[turns < 0.8], 8.0))
    assert bool((ratio.diff() >= 0).all())


def test_factor_one_changes_nothing():
    positions = torch.arange(50)[None]
    plain = rotation(positions, "half", 64, 1e4, dtype=torch.float64)
    scaled = rotation(positions, "half", 64, 1e4, factor=Yarn(1.0, 2048), dtype=torch.float64)
    torch.testing.assert_close(scaled, plain)
