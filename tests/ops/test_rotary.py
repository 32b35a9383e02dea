"""Context extension of rotary positions: the frequencies and gain of transformers, and their limits."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from retnet.ops.rotary import Llama3, Yarn, frequencies, rotate, rotate_first, rotation


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


@pytest.mark.parametrize(
    ("kind", "options", "ours"),
    [
        ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0}, Llama3(8.0, 64)),
        ("llama3", {"low_freq_factor": 0.5, "high_freq_factor": 7.0}, Llama3(8.0, 64, slow=0.5, fast=7.0)),
        ("yarn", {"beta_fast": 8.0, "beta_slow": 0.5}, Yarn(8.0, 64, fast=8.0, slow=0.5)),
        ("yarn", {"truncate": False, "attention_factor": 1.7}, Yarn(8.0, 64, temperature=1.7, whole_bounds=False)),
        ("yarn", {"original_max_position_embeddings": 5}, Yarn(8.0, 5)),  # shorter than one turn
        ("yarn", {"rope_theta": 1.5}, Yarn(8.0, 64)),  # every pair is fast
    ],
)
def test_scaled_frequencies_agree_with_transformers(kind, options, ours):
    parameters = {
        "rope_type": kind, "factor": 8.0, "rope_theta": 500.0, "original_max_position_embeddings": 64, **options,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=48, num_attention_heads=1, max_position_embeddings=512, rope_parameters=parameters)
    theirs, gain = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    base = parameters["rope_theta"]
    plain = frequencies("half", 48, base, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(ours.frequencies(plain, "half", base), theirs, rtol=2e-6, atol=0)
    assert ours.gain == pytest.approx(gain)


@pytest.mark.parametrize("change", [{"factor": 0.0}, {"length": -1}, {"fast": math.nan}, {"slow": math.inf}])
@pytest.mark.parametrize("kind", [Yarn, Llama3])
def test_a_scaling_that_turns_no_pair_is_refused(kind, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*accepted: a positive number"):
        kind(**{"factor": 2.0, "length": 64} | change)


def test_llama3_needs_a_range_of_turns():
    with pytest.raises(ValueError, match=r"slow is 4.0, fast 4.0; accepted: slow < fast"):
        Llama3(2.0, 64, slow=4.0)


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
def test_a_partial_rotation_turns_the_first_components_as_a_narrower_head(rotary):
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rotation(torch.arange(10).view(2, 5), rotary, 4, 100.0, dtype=torch.float64)
    turned = rotate_first(x, cos, sin, rotary)
    assert torch.equal(turned[..., :4], rotate(x[..., :4], cos, sin, rotary))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[..., :4], x[..., :4])
