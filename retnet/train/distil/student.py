"""The student of a distillation: the teacher, with retention in place of attention in some layers.

A retention layer takes the teacher's q, k, v and output projections, head widths, shared heads, rotary positions and
norms of q and k. What attention does not have starts so that it changes nothing, or as little as it can:

    gate           weights 0, so a sigmoid gate is 1/2, which the scale of the heads makes up for
    decay          the paper's schedule; where it depends on the token, its weights are 0 and its bias is the schedule
    convolution    the current token alone
    head norm      its weights, or those of the output projection, bring each head to the teacher's
    output         the teacher's projection, moved to the least error of the layer's output (both: `fit.py`)

Everything else is the teacher's: embedding, norms, feed-forward, head, and the attention of the other layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import Block, BlockConfig
from retnet.layers.retention import MultiScaleRetention, RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.directory import build_empty
from retnet.models.lm import LanguageModel

# Fields of RetentionConfig that a stack may leave out.
DEFAULTS: dict[str, Any] = {
    "decay": "gated",
    "gated_start": "paper",
    "conv_width": 4,
    "conv_activation": "none",
    "gate": "sigmoid",
    "head_norm": "rms",
    "head_norm_affine": "per_head",
}
GATES = ("sigmoid", "none")
# Fields of AttentionConfig that retention has under the same name, and those that it does without.
_TAKEN = ("num_heads", "qk_norm", "qk_norm_eps")
_LEFT_OUT = ("window", "dropout", "kind")
_TRANSLATED = ("num_kv_heads", "head_dim", "gate", "qkv_bias", "out_bias")


def retention_of(attention: AttentionConfig, given: Mapping[str, Any]) -> RetentionConfig:
    """The retention that takes the place of an attention layer. given: the fields that a stack sets.

    Raises ValueError for attention that retention cannot take the weights of, and for a field that is the teacher's.
    """
    taken = {name: getattr(attention, name) for name in _TAKEN} | _rotary(attention)
    known = {*taken, *_LEFT_OUT, *_TRANSLATED}
    for field in fields(attention):
        default = field.default if field.default is not MISSING else None
        if field.name not in known and getattr(attention, field.name) != default:
            raise ValueError(
                f"the teacher's attention has {field.name} {getattr(attention, field.name)!r}, which retention has no "
                f"counterpart of; accepted: {field.name} {default!r}"
            )
    width = attention.num_heads * attention.head_dim
    taken |= {
        "key_dim": width,
        "value_dim": width,
        "num_kv_heads": None if attention.num_kv_heads == attention.num_heads else attention.num_kv_heads,
        "bias": attention.qkv_bias or attention.out_bias,
    }
    if attention.qk_norm == "none":  # then it is the student's choice
        del taken["qk_norm"], taken["qk_norm_eps"]
    elif attention.gate != "none":
        taken["gate"] = attention.gate
    for name, value in given.items():
        if name in taken and value != taken[name]:
            raise ValueError(f"{name} is {value!r} and the teacher's is {taken[name]!r}; accepted: to leave it out")
    values = DEFAULTS | dict(given) | taken
    if values["decay"] != "gated":
        values["gated_start"] = None
    if values["gate"] not in GATES:
        raise ValueError(
            f"gate is {values['gate']!r}, which has no weights at which it is constant; accepted: {', '.join(GATES)}"
        )
    return RetentionConfig(**values)


def _rotary(attention: AttentionConfig) -> dict[str, Any]:
    """The fields about rotary positions. Raises ValueError for one that retention does not have."""
    own = {field.name for field in fields(RetentionConfig)}
    values = {f.name: getattr(attention, f.name) for f in fields(attention) if f.name.startswith("rotary")}
    defaults = {f.name: f.default for f in fields(attention)}
    foreign = [name for name in values if name not in own and values[name] != defaults[name]]
    if foreign:
        raise ValueError(f"the teacher's attention has {foreign[0]}, which retention does not have")
    return {name: value for name, value in values.items() if name in own}


def student_config(teacher: ModelConfig, mixers: Sequence[RetentionConfig | None]) -> ModelConfig:
    """The teacher's configuration with other mixers, by layer; None keeps the teacher's."""
    layers = (
        layer if mixer is None else replace(layer, mixer=mixer)
        for layer, mixer in zip(teacher.layers, mixers, strict=True)
    )
    return replace(teacher, layers=cast(tuple[BlockConfig, ...], tuple(layers)), source=None)


def converted_layers(teacher: ModelConfig, student: ModelConfig) -> list[int]:
    """The layers whose mixer is not the teacher's."""
    pairs = zip(teacher.layers, student.layers, strict=True)
    return [i for i, (was, now) in enumerate(pairs) if was.mixer != now.mixer]


@torch.no_grad()
def make_student(teacher: LanguageModel, config: ModelConfig) -> LanguageModel:
    """The student, in the teacher's dtype, before its head outputs are scaled. It shares the weights that it has in
    common with the teacher."""
    student = build_empty(config)
    given = dict(teacher.state_dict())
    for i in converted_layers(teacher.config, config):
        mixer = MultiScaleRetention(cast(RetentionConfig, config.layers[i].mixer), config.d_model)
        mixer.to(teacher.embedding.weight.device, teacher.embedding.weight.dtype).reset_own()
        prefix = f"layers.{i}.mixer."
        start_mixer_(mixer, {n.removeprefix(prefix): given.pop(n) for n in list(given) if n.startswith(prefix)})
        cast(Block, student.layers[i]).mixer = mixer
    student.load_state_dict(given, strict=False, assign=True)
    if config.tie_embeddings:
        student.head.weight = student.embedding.weight
    empty = [name for name, x in student.state_dict().items() if x.is_meta]
    if empty:
        raise ValueError(f"the teacher has no weights for {', '.join(empty[:5])}")
    return student.eval()


@torch.no_grad()
def start_mixer_(mixer: MultiScaleRetention, attention: Mapping[str, Tensor]) -> None:
    """Write the start of a retention layer: the weights of attention, by name, and what the module's text says."""
    own = ("decay_proj.bias", "log_rate")  # the schedule, which a new module begins with
    for name, weight in mixer.named_parameters():
        if name in attention:
            weight.copy_(attention[name])
        elif name == "conv.weight":
            weight.zero_()[..., -1] = 1
        elif name.endswith("norm_weight"):
            weight.fill_(1)
        elif name not in own:
            weight.zero_()


@torch.no_grad()
def scale_heads_(mixer: MultiScaleRetention, factor: Tensor) -> None:
    """Multiply the head outputs by factor [H, 1] or [H, V]: in the weights of the head norm if each head has its own,
    otherwise in the output projection."""
    config = mixer.config
    spread = factor.expand(config.num_heads, config.head_value_dim)
    if config.head_norm_affine == "per_head":
        norm = cast(nn.Parameter, mixer.head_norm_weight)
        norm.mul_(spread.to(norm.device, norm.dtype))
    else:
        weight = mixer.out_proj.weight
        weight.mul_(spread.flatten().to(weight.device, weight.dtype))
