"""Presets: the model sizes of the paper (Table 2 of arXiv 2307.08621) and smaller ones, by name.

Every layer has 12 D^2 weights: retention 8 D^2 with values of width 2 D, feed-forward 4 D^2 with hidden width 2 D. Each
name also exists with `-gated` (data-dependent decay).
"""

from collections.abc import Callable

from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig

# name -> (layers, width, heads)
SIZES = {
    "retnet-125m": (12, 768, 3),
    "retnet-350m": (24, 1024, 4),
    "retnet-1.3b": (24, 2048, 8),
    "retnet-2.7b": (32, 2560, 10),
    "retnet-6.7b": (32, 4096, 16),
    "retnet-13b": (40, 5120, 20),
}
GPT2_VOCAB_SIZE = 50304  # GPT-2's 50257, rounded up to a multiple of 64


def retnet_config(
    name: str,
    num_layers: int,
    d_model: int,
    num_heads: int,
    *,
    gated: bool = False,
    vocab_size: int = GPT2_VOCAB_SIZE,
    **options,
) -> ModelConfig:
    """The paper's architecture at any size; `options` are fields of ModelConfig."""
    mixer = RetentionConfig(num_heads, key_dim=d_model, value_dim=2 * d_model, decay="gated" if gated else "paper")
    layer = BlockConfig(mixer, FeedForwardConfig(2 * d_model))
    return ModelConfig(vocab_size, d_model, (layer,) * num_layers, name=name, **options)


def _tiny(gated: bool) -> ModelConfig:
    name = "retnet-tiny-gated" if gated else "retnet-tiny"
    return retnet_config(name, 3, 288, 3, gated=gated, vocab_size=257, bos_token_id=256)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "retnet-tiny": lambda: _tiny(False),
    "retnet-tiny-gated": lambda: _tiny(True),
    **{
        name + suffix: lambda name=name, size=size, suffix=suffix: retnet_config(
            name + suffix, *size, gated=bool(suffix)
        )
        for name, size in SIZES.items()
        for suffix in ("", "-gated")
    },
}


def preset(name: str) -> ModelConfig:
    """The configuration of a preset. Raises ValueError naming the accepted ones."""
    if name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]()
