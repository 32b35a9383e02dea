"""Stacks that differ only in their mixers, for `mqar.py` and `mixers.py`.

The tri-mixer is the preset `arch_expert_research_mini` at a given width, depth and vocabulary; at its own size it is
that preset. The other stacks repeat one of its three layers, or a retention layer that is gated or has a short
convolution. All have the same depth, the same width and, in every recurrent layer, the same number of floats in the
memory. The feed-forward widths make the parameters equal, up to `STEP` columns.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

from equal_parameters import with_equal_parameters

from retnet import ModelConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.models.cost import parameter_counts
from retnet.stack.resolve import resolve_config

STEP = 4  # of feed-forward widths: makes layers equal within 2% at width 64
CONV_WIDTH = 4
REFERENCE = "tri-mixer"

# stack -> the layers that it repeats: Attention, Retention, Gated retention, Mamba-2; small letters: retention with a
# short convolution on q, k and v
PATTERNS = {
    "attention": "A",
    "RetNet": "R",
    "gated RetNet": "G",
    "Mamba-2": "M",
    "RetNet + attention": "RRA",
    REFERENCE: "MRA",
    "RetNet + conv": "r",
    "gated RetNet + conv": "g",
    "R R R A + conv": "gggA",
}
WITHOUT_CONVOLUTION = tuple(name for name, pattern in PATTERNS.items() if pattern.isupper())


@dataclass(frozen=True)
class Size:
    """heads: heads of the recurrent mixers, whose state has 2 d_model^2 / heads floats per layer. Pairs of
    attention_heads share keys and values, if there is more than one."""

    d_model: int = 128
    heads: int = 4
    attention_heads: int = 4
    num_layers: int = 6
    vocab_size: int = 257
    feed_forward: int = 256  # of the tri-mixer
    init: Literal["paper", "torchscale", "normal"] = "normal"


def equal_stacks(size: Size, names: tuple[str, ...] = WITHOUT_CONVOLUTION, seed: int = 0) -> dict[str, ModelConfig]:
    """The named stacks, each with as many parameters as the tri-mixer (embeddings are equal in all)."""
    target = parameter_counts(_stack(size, seed, REFERENCE, size.feed_forward))["total"]
    return {name: with_equal_parameters(partial(_stack, size, seed, name), target, STEP) for name in names}


def _stack(size: Size, seed: int, name: str, feed_forward: int) -> ModelConfig:
    preset = resolve_config("arch_expert_research_mini")
    blocks = _blocks(preset, size)
    pattern = PATTERNS[name]
    wide = replace(cast(FeedForwardConfig, preset.layers[0].feed_forward), hidden_dim=feed_forward)
    layers = tuple(replace(blocks[pattern[i % len(pattern)]], feed_forward=wide) for i in range(size.num_layers))
    # The preset's document start and source do not apply to another vocabulary and size.
    own = {"bos_token_id": None, "source": None, "init": size.init, "seed": seed}
    return replace(preset, d_model=size.d_model, vocab_size=size.vocab_size, layers=layers, **own)


def _blocks(preset: ModelConfig, size: Size) -> dict[str, BlockConfig]:
    """The preset's three layers and a gated retention layer at this size, by the letters of PATTERNS."""
    mamba, retention, attention = preset.layers[:3]
    D, H = size.d_model, size.heads
    wide_mamba = replace(mamba.mixer, inner_dim=2 * D, head_dim=2 * D // H, state_dim=D // H)
    wide_retention = replace(retention.mixer, num_heads=H, key_dim=D, value_dim=2 * D)
    A = size.attention_heads
    wide_attention = replace(attention.mixer, num_heads=A, num_kv_heads=max(1, A // 2), head_dim=D // A)
    gated = replace(wide_retention, decay="gated")
    return {
        "M": replace(mamba, mixer=wide_mamba),
        "R": replace(retention, mixer=wide_retention),
        "G": replace(retention, mixer=gated),
        "r": replace(retention, mixer=replace(wide_retention, conv_width=CONV_WIDTH)),
        "g": replace(retention, mixer=replace(gated, conv_width=CONV_WIDTH)),
        "A": replace(attention, mixer=wide_attention),
    }
