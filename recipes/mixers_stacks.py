"""Stacks that differ in their mixers and in nothing else: what `mqar.py` and `mixers.py` compare.

The tri-mixer is the preset `arch_expert_research_mini` at the width, depth and vocabulary asked for; at its own size it
is that preset. The others put one of its three layers (or a gated retention) in all places. All have one depth, one
width and, in every recurrent layer, as many floats of state; the widths of the feed-forwards then make the parameters
equal, within a step of `STEP` columns.
"""

from dataclasses import dataclass, replace
from typing import Literal, cast

from retnet import ModelConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.models.cost import parameter_counts
from retnet.stack.resolve import resolve_config

STEP = 4  # of feed-forward widths: fine enough for layers equal within 2 % at width 64
REFERENCE = "tri-mixer"

# stack -> the layers that it repeats: attention, paper's and gated retention, Mamba-2
PATTERNS = {
    "attention": "A",
    "RetNet": "R",
    "gated RetNet": "G",
    "Mamba-2": "M",
    "RetNet + attention": "RRA",
    REFERENCE: "MRA",
}


@dataclass(frozen=True)
class Size:
    """heads: of the recurrent mixers, whose state is then 2 d_model^2 / heads floats a layer; attention_heads share
    keys and values in pairs where they can."""

    d_model: int = 128
    heads: int = 4
    attention_heads: int = 4
    num_layers: int = 6
    vocab_size: int = 257
    feed_forward: int = 256  # of the tri-mixer
    init: Literal["paper", "torchscale", "normal"] = "normal"


def equal_stacks(size: Size, names: tuple[str, ...] = tuple(PATTERNS), seed: int = 0) -> dict[str, ModelConfig]:
    """The named stacks at one size, each with as many parameters as the tri-mixer (embeddings are the same in all)."""
    target = parameter_counts(_stack(REFERENCE, size, size.feed_forward, seed))["total"]
    return {name: _matched(name, size, target, seed) for name in names}


def _matched(name: str, size: Size, target: int, seed: int) -> ModelConfig:
    """Parameters grow by a constant with each column of the feed-forwards."""
    one, two = (parameter_counts(_stack(name, size, width, seed))["total"] for width in (STEP, 2 * STEP))
    steps = max(1, 1 + round((target - one) / (two - one)))
    return _stack(name, size, steps * STEP, seed)


def _stack(name: str, size: Size, feed_forward: int, seed: int) -> ModelConfig:
    preset = resolve_config("arch_expert_research_mini")
    blocks = _blocks(preset, size)
    pattern = PATTERNS[name]
    wide = replace(cast(FeedForwardConfig, preset.layers[0].feed_forward), hidden_dim=feed_forward)
    layers = tuple(replace(blocks[pattern[i % len(pattern)]], feed_forward=wide) for i in range(size.num_layers))
    # The preset's document start and source are not those of another vocabulary and size.
    own = {"bos_token_id": None, "source": None, "init": size.init, "seed": seed}
    return replace(preset, d_model=size.d_model, vocab_size=size.vocab_size, layers=layers, **own)


def _blocks(preset: ModelConfig, size: Size) -> dict[str, BlockConfig]:
    """The preset's three layers and a gated retention, by the letters of PATTERNS, at this size."""
    mamba, retention, attention = preset.layers[:3]
    D, H = size.d_model, size.heads
    wide_mamba = replace(mamba.mixer, inner_dim=2 * D, head_dim=2 * D // H, state_dim=D // H)
    wide_retention = replace(retention.mixer, num_heads=H, key_dim=D, value_dim=2 * D)
    A = size.attention_heads
    wide_attention = replace(attention.mixer, num_heads=A, num_kv_heads=max(1, A // 2), head_dim=D // A)
    return {
        "M": replace(mamba, mixer=wide_mamba),
        "R": replace(retention, mixer=wide_retention),
        "G": replace(retention, mixer=replace(wide_retention, decay="gated")),
        "A": replace(attention, mixer=wide_attention),
    }
