"""Presets: the model sizes of the paper (Table 2 of arXiv 2307.08621) and smaller ones, by name, each in several forms.

    retnet-125m          the paper's form: decays fixed per head
    retnet-125m-gated    decays that depend on the token
    retnet-125m-conv     and a short convolution on q, k and v, and a sigmoid gate: the best retention without attention
    retnet-125m-hybrid   the same with attention in every fourth layer: the best of all at equal parameters
    retnet-125m-...-mup  any of them under muP (`retnet.models.mup`), relative to a model of one head

A layer of the paper has 12 D^2 weights: retention 8 D^2 with values of width 2 D, feed-forward 4 D^2 with hidden width
2 D. The other forms have as many in total.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.mup import with_mup
from retnet.system.suggest import choices

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
MUP = "-mup"  # suffix of any preset
ATTENTION_EVERY = 4  # layers; the last layer of a hybrid is attention


@dataclass(frozen=True)
class Form:
    """The values in which a form differs from the paper's."""

    gated: bool = False
    conv_width: int | None = None
    hybrid: bool = False
    gate: Literal["swish", "sigmoid"] = "swish"


FORMS = {
    "": Form(),
    "-gated": Form(gated=True),
    "-conv": Form(gated=True, conv_width=4, gate="sigmoid"),
    "-hybrid": Form(gated=True, conv_width=4, hybrid=True, gate="sigmoid"),
}


def retnet_config(
    name: str,
    num_layers: int,
    d_model: int,
    num_heads: int,
    *,
    form: Form = FORMS[""],
    vocab_size: int = GPT2_VOCAB_SIZE,
    **options,
) -> ModelConfig:
    """The paper's architecture or another form of it at any size; `options` are fields of ModelConfig."""
    D, decay = d_model, "gated" if form.gated else "paper"
    retention = RetentionConfig(
        num_heads, key_dim=D, value_dim=2 * D, decay=decay, gate=form.gate, conv_width=form.conv_width
    )
    if not form.hybrid:
        layers = (BlockConfig(retention, FeedForwardConfig(2 * D)),) * num_layers
        return ModelConfig(vocab_size, D, layers, name=name, **options)
    # A quarter of a retention head's width, in groups of two: 3 D^2 weights per layer for retention's 8.
    attention = AttentionConfig(4 * num_heads, 2 * num_heads, head_dim=D // (4 * num_heads))
    mixers = [attention if _is_attention(i, num_layers) else retention for i in range(num_layers)]
    saved = 5 * D * mixers.count(attention) / (2 * num_layers)
    feed_forward = FeedForwardConfig(round((2 * D + saved) / 32) * 32)
    layers = tuple(BlockConfig(mixer, feed_forward) for mixer in mixers)
    return ModelConfig(vocab_size, D, layers, name=name, **options)


def _is_attention(layer: int, num_layers: int) -> bool:
    return layer % ATTENTION_EVERY == ATTENTION_EVERY - 1 or layer == num_layers - 1


def _tiny(suffix: str) -> ModelConfig:
    return retnet_config("retnet-tiny" + suffix, 3, 288, 3, form=FORMS[suffix], vocab_size=257, bos_token_id=256)


def _full(name: str, suffix: str) -> ModelConfig:
    return retnet_config(name + suffix, *SIZES[name], form=FORMS[suffix])


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    **{"retnet-tiny" + suffix: lambda suffix=suffix: _tiny(suffix) for suffix in FORMS},
    **{name + suffix: lambda name=name, suffix=suffix: _full(name, suffix) for name in SIZES for suffix in FORMS},
}


def is_preset(name: str) -> bool:
    """Whether a preset has the name, with or without muP."""
    return name.removesuffix(MUP) in PRESETS


def preset(name: str) -> ModelConfig:
    """The configuration of a preset. Raises ValueError naming the accepted ones."""
    if not is_preset(name):
        raise ValueError(f"no preset is named {name!r}; {choices(name, PRESETS)}")
    config = PRESETS[name.removesuffix(MUP)]()
    if not name.endswith(MUP):
        return config
    retention = next(layer.mixer for layer in config.layers if isinstance(layer.mixer, RetentionConfig))
    return replace(with_mup(config, config.d_model // retention.num_heads), name=name)
