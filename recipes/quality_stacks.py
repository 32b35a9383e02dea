"""Stacks for `quality.py`, by name: a base and values changed in it, all with as many parameters as the paper's RetNet.

    llama   retnet   gated   retnet-conv   gated-conv   mamba2   hybrid   tri-mixer   ...          (BASES)
    gated-conv+sigmoid   llama+qk-rms   hybrid+rms+swiglu   ...                                     (CHANGES)

Retention layers are the paper's: 3 heads, values twice as wide as keys, layer norm, gelu. Attention is grouped, with
half as many heads of keys and values, in blocks with RMSNorm and SwiGLU where the whole stack is of that kind. In a
stack of several mixers all feed-forwards are equally wide, and their width makes the parameters equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from equal_parameters import with_equal_parameters
from variants import with_decay_list, with_variant

from retnet import ModelConfig
from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.hyena import HyenaConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixer_base import MixerConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.cost import parameter_counts
from retnet.models.presets import retnet_config

CONV_WIDTH = 4


@dataclass(frozen=True)
class Shape:
    """heads: of retention. state_dim, head_dim: of Mamba-2. step: feed-forward widths are multiples of it."""

    d_model: int = 768
    num_layers: int = 12
    heads: int = 3
    attention_heads: int = 12
    state_dim: int = 128
    head_dim: int = 64
    step: int = 64
    vocab_size: int = 50304


SHAPES = {
    "125m": Shape(),
    "40m": Shape(512, 6, heads=2, attention_heads=8),
    "350m": Shape(1024, 24, heads=4, attention_heads=16),
    "tiny": Shape(64, 4, heads=2, attention_heads=2, state_dim=16, head_dim=32, step=4, vocab_size=257),
}


@dataclass(frozen=True)
class Base:
    """pattern: mixers of the layers, repeated over the depth: Attention, paper's Retention, Gated retention, Mamba-2,
    Selective state space of Mamba-1, Hyena; small letters: retention with a short convolution. modern: RMSNorm and
    SwiGLU in place of layer norm and gelu.
    """

    pattern: str
    modern: bool = False
    init: str = "paper"


BASES = {
    "llama": Base("A", modern=True, init="normal"),
    "retnet": Base("R"),
    "gated": Base("G"),
    "retnet-conv": Base("r"),
    "gated-conv": Base("g"),
    "mamba2": Base("M", modern=True, init="normal"),
    "hybrid": Base("gggA"),
    "hybrid-retnet-conv": Base("rrrA"),
    "hybrid-gated": Base("GGGA"),
    "hybrid-retnet": Base("RRRA"),
    "mamba": Base("S"),
    "hyena": Base("H"),
    "tri-mixer": Base("MRA", modern=True, init="normal"),
    "tri-mixer-conv": Base("MgA", modern=True, init="normal"),
}

Change = Callable[[ModelConfig], ModelConfig]


def changed(config: Any, **values: Any) -> Any:
    """`replace`, with an error that names the fields that this version of the library does not have."""
    unknown = sorted(set(values) - {field.name for field in fields(config)})
    if unknown:
        raise ValueError(f"{type(config).__name__} has no {', '.join(unknown)} in this version of the library")
    return replace(config, **values)


def _mixers(config: ModelConfig, kind: type[MixerConfig], **values: Any) -> ModelConfig:
    """The values in every mixer of that kind. Raises ValueError if there is none."""
    if not any(isinstance(layer.mixer, kind) for layer in config.layers):
        raise ValueError(f"the stack has no {kind.__name__} for {', '.join(values)}")
    layers = (
        replace(layer, mixer=changed(layer.mixer, **values)) if isinstance(layer.mixer, kind) else layer
        for layer in config.layers
    )
    return replace(config, layers=tuple(layers))


def _retention(**values: Any) -> Change:
    return partial(_mixers, kind=RetentionConfig, **values)


def _attention(**values: Any) -> Change:
    return partial(_mixers, kind=AttentionConfig, **values)


def _qk_norm(norm: str) -> Change:
    """Of all mixers that have queries and keys."""

    def change(config: ModelConfig) -> ModelConfig:
        kinds = [kind for kind in (RetentionConfig, AttentionConfig) if _has(config, kind)]
        if not kinds:
            raise ValueError("the stack has no layer with queries and keys")
        for kind in kinds:
            config = _mixers(config, kind, qk_norm=norm)
        return config

    return change


def _has(config: ModelConfig, kind: type[MixerConfig]) -> bool:
    return any(isinstance(layer.mixer, kind) for layer in config.layers)


def _norms(config: ModelConfig, norm: str) -> ModelConfig:
    layers = tuple(replace(layer, norm=norm) for layer in config.layers)
    return replace(config, layers=layers, final_norm=norm)


def _feed_forwards(config: ModelConfig, **values: Any) -> ModelConfig:
    layers = (replace(layer, feed_forward=replace(layer.feed_forward, **values)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


def _all_heads(config: ModelConfig) -> ModelConfig:
    return _mixers(config, AttentionConfig, num_kv_heads=_num_heads(config, AttentionConfig))


def _heads(config: ModelConfig, factor: float) -> ModelConfig:
    return _mixers(config, RetentionConfig, num_heads=round(factor * _num_heads(config, RetentionConfig)))


def _widths(config: ModelConfig, keys: float = 1, values: float = 1) -> ModelConfig:
    """Multiplies the widths of the keys and of the values of retention."""
    first = next((layer.mixer for layer in config.layers if isinstance(layer.mixer, RetentionConfig)), None)
    if first is None:
        raise ValueError("the stack has no RetentionConfig for key_dim and value_dim")
    return _mixers(config, RetentionConfig, key_dim=int(keys * first.key_dim), value_dim=int(values * first.value_dim))


def _num_heads(config: ModelConfig, kind: type[MixerConfig]) -> int:
    """Of the first mixer of that kind; 0 without one."""
    return next((layer.mixer.num_heads for layer in config.layers if isinstance(layer.mixer, kind)), 0)


CHANGES: dict[str, Change] = {
    "sigmoid": _retention(gate="sigmoid"),
    "no-gate": _retention(gate="none"),
    "head-rms": _retention(head_norm="rms"),
    "no-head-norm": _retention(head_norm="none"),
    "no-decay": _retention(decay="none"),
    "one-decay": _retention(decay=127 / 128),
    "linear": _retention(decay="none", rotary="none", gate="none"),
    "qk-l2": _qk_norm("l2"),
    "qk-rms": _qk_norm("rms"),
    "start": _retention(gated_start="paper"),
    "conv": _retention(conv_width=CONV_WIDTH),
    "conv-qk": _retention(conv_width=CONV_WIDTH, conv_on=("q", "k")),
    "conv-v": _retention(conv_width=CONV_WIDTH, conv_on=("v",)),
    "conv-plain": _retention(conv_width=CONV_WIDTH, conv_activation="none"),
    "conv2": _retention(conv_width=2),
    "conv3": _retention(conv_width=3),
    "no-rotary": _retention(rotary="none"),
    "signed": partial(with_variant, signed=True),
    "rotated": partial(with_variant, rotated=True),
    "two-tap": partial(with_variant, two_tap=True),
    "canon": partial(with_variant, canon=CONV_WIDTH),
    "canon-silu": partial(with_variant, canon=CONV_WIDTH, canon_activation="silu"),
    "alibi": partial(with_decay_list, by_layer=False),
    "layer-decay": partial(with_decay_list, by_layer=True),
    "rms": partial(_norms, norm="rms"),
    "swiglu": partial(_feed_forwards, gated=True, activation="swish"),
    "layer": partial(_norms, norm="layer"),
    "gelu": partial(_feed_forwards, gated=False, activation="gelu"),
    "narrow": partial(_widths, values=0.5),
    "half-keys": partial(_widths, keys=0.5),
    "wide-keys": partial(_widths, keys=2),
    "heads2": partial(_heads, factor=2 / 3),
    "heads6": partial(_heads, factor=2),
    "heads12": partial(_heads, factor=4),
    "mha": _all_heads,
    "nope": _attention(rotary="none"),
    "attention-gate": _attention(gate="sigmoid"),
    "init-normal": lambda config: replace(config, init="normal"),
    "init-paper": lambda config: replace(config, init="paper"),
}


def stack(name: str, shape: Shape, seed: int = 0) -> ModelConfig:
    """The configuration that a name describes.

    Raises ValueError for an unknown name, or one that needs fields that the library does not have.
    """
    base, *suffixes = name.split("+")
    if base not in BASES:
        raise ValueError(f"no stack is named {base!r}; accepted: {', '.join(BASES)}")
    if unknown := [suffix for suffix in suffixes if suffix not in CHANGES]:
        raise ValueError(f"no change is named {', '.join(unknown)}; accepted: {', '.join(CHANGES)}")
    paper = retnet_config(
        "retnet", shape.num_layers, shape.d_model, shape.heads, vocab_size=shape.vocab_size, seed=seed
    )

    def build(width: int) -> ModelConfig:
        config = _plain(paper, BASES[base], shape, width)
        for suffix in suffixes:
            config = CHANGES[suffix](config)
        return replace(config, name=name)

    return with_equal_parameters(build, parameter_counts(paper)["total"], shape.step)


def _plain(paper: ModelConfig, base: Base, shape: Shape, width: int) -> ModelConfig:
    norm = "rms" if base.modern else "layer"
    wide = FeedForwardConfig(width, gated=True, activation="swish") if base.modern else FeedForwardConfig(width)
    blocks = {letter: BlockConfig(_mixer(letter, paper, shape), wide, norm=norm) for letter in set(base.pattern)}
    layers = tuple(blocks[base.pattern[i % len(base.pattern)]] for i in range(shape.num_layers))
    return replace(paper, layers=layers, final_norm=norm, init=base.init)


def _mixer(letter: str, paper: ModelConfig, shape: Shape) -> MixerConfig:
    D, H = shape.d_model, shape.attention_heads
    if letter == "A":
        return AttentionConfig(num_heads=H, num_kv_heads=H // 2, head_dim=D // H)
    if letter == "M":
        return Mamba2Config(inner_dim=2 * D, head_dim=shape.head_dim, state_dim=shape.state_dim)
    if letter == "S":
        return Mamba1Config(inner_dim=2 * D, time_step_rank=D // 16)
    if letter == "H":
        return HyenaConfig()
    retention = replace(paper.layers[0].mixer, decay="gated" if letter in "gG" else "paper")
    return changed(retention, conv_width=CONV_WIDTH) if letter.islower() else retention
