"""Single layers of flash-linear-attention as mixers of ours, for models that are built of its layers.

FLA has no whole model of some of its layers, and models of a user's own put them into other blocks. `load_layer` reads
one layer's weights: the module computes what FLA's does, and goes into a block of ours.

| FLA's class | ours |
|---|---|
| MultiScaleRetention | retention |
| SimpleGatedLinearAttention | retention with a gated decay, whose projection has a bias |
| YOCOGatedRetention | retention with a gated decay (arXiv 2405.05254) |
| Mamba2 | mamba2 |
| Attention | attention |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixer_base import MixerConfig, MixerModule
from retnet.layers.registry import mixer_of
from retnet.layers.retention import RetentionConfig
from retnet.models.convert.fields import (
    Field,
    choice,
    flag,
    ignored,
    only,
    positive,
    read,
    refuse,
    size,
    time_step_bounds,
    time_steps,
    times,
    unit_interval,
)  # fmt: skip
from retnet.models.convert.fla import attention_of
from retnet.system.suggest import choices

Names = Mapping[str, tuple[str, ...]]  # our parameter -> theirs, whose rows are joined

_GATES = {"swish": "swish", "silu": "swish", "sigmoid": "sigmoid"}
_ANY = {  # without effect on outputs: kernels, the place of the layer
    "backend": ignored("text", str),
    "fuse_norm": flag(True),
    "layer_idx": size(None, least=0),
    "max_position_embeddings": size(None),
}
_HEADS = {
    **_ANY,
    "conv_bias": only(False),
    "conv_size": size(4),
    "elementwise_affine": flag(True),
    "expand_k": times(1.0),
    "expand_v": times(1.0),
    "feature_map": only(None),
    "gate_fn": choice("swish", *_GATES),
    "hidden_size": size(1024),
    "norm_eps": unit_interval(1e-5),
    "num_kv_heads": size(None),
}
_RETENTION: dict[str, Field] = {
    **_HEADS,
    "expand_v": times(2.0),
    "mode": choice("chunk", "chunk", "fused_chunk", "parallel", "fused_recurrent"),
    "num_heads": size(8),
    "use_output_gate": flag(True),
    "use_short_conv": flag(False),
}
_SIMPLE_GLA: dict[str, Field] = {
    **_HEADS,
    "gate_logit_normalizer": positive(16),
    "mode": choice("chunk", "chunk", "fused_recurrent"),
    "num_heads": size(4),
    "use_short_conv": flag(True),
}
_YOCO: dict[str, Field] = {
    **_ANY,
    "gate_logit_normalizer": positive(16.0),
    "hidden_size": size(2048),
    "mode": choice("chunk", "chunk", "fused_recurrent"),
    "norm_eps": unit_interval(1e-6),
    "num_heads": size(32),
    "rope_inv_freq": choice("fla", "fla", "yoco"),
    "rope_theta": positive(10000.0),
}
_MAMBA2: dict[str, Field] = {
    **_ANY,
    "A_init_range": ignored("two numbers", (list, tuple)),
    "D_has_hdim": only(False),
    "chunk_size": size(256),
    "conv_init": ignored("a number", (int, float)),
    "conv_kernel": size(4),
    "dt_init_floor": positive(1e-4),
    "dt_limit": time_steps(),
    "dt_max": positive(0.1),
    "dt_min": positive(0.001),
    "expand": times(2),
    "head_dim": size(64),
    "hidden_act": only("silu", "swish"),
    "hidden_size": size(2048),
    "n_groups": size(1),
    "norm_before_gate": flag(False),
    "norm_eps": unit_interval(1e-5),
    "num_heads": size(None),
    "rmsnorm": flag(True),
    "state_size": size(128),
    "use_bias": flag(False),
    "use_conv_bias": flag(True),
}
_ATTENTION: dict[str, Field] = {
    **_ANY,
    "hidden_size": size(2048),
    "num_heads": size(32),
    "num_kv_heads": size(None),
    "qk_norm": flag(False),
    "qkv_bias": flag(False),
    "rope_theta": positive(10000.0),
    "window_size": size(None),
}


def _heads(value: Mapping[str, Any], **options: Any) -> RetentionConfig:
    """Retention of the fields that MultiScaleRetention and SimpleGatedLinearAttention share."""
    width = value["hidden_size"]
    return RetentionConfig(
        num_heads=value["num_heads"],
        num_kv_heads=value["num_kv_heads"],
        key_dim=int(width * value["expand_k"]),
        value_dim=int(width * value["expand_v"]),
        conv_width=value["conv_size"] if value["use_short_conv"] else None,
        head_norm="rms",
        head_norm_affine="shared" if value["elementwise_affine"] else "none",
        head_norm_eps=value["norm_eps"],
        **options,
    )


def _retention(value: Mapping[str, Any]) -> RetentionConfig:
    gate = _GATES[value["gate_fn"]] if value["use_output_gate"] else "none"
    return _heads(value, rotary="half", gate=gate)


def _simple_gla(value: Mapping[str, Any]) -> RetentionConfig:
    options = {"decay": "gated", "gated_start": "paper", "decay_scale": 16 / value["gate_logit_normalizer"]}
    return _heads(value, rotary="none", gate=_GATES[value["gate_fn"]], **options)


def _yoco(value: Mapping[str, Any]) -> RetentionConfig:
    return RetentionConfig(
        num_heads=value["num_heads"],
        key_dim=value["hidden_size"],
        value_dim=value["hidden_size"],
        decay="gated",
        decay_scale=16 / value["gate_logit_normalizer"],
        # Neighbours rotate together there, with the frequencies of either convention here.
        rotary="interleaved" if value["rope_inv_freq"] == "yoco" else "half",
        rotary_base=value["rope_theta"],
        head_norm="rms",
        head_norm_eps=value["norm_eps"],
    )


def _mamba2(value: Mapping[str, Any]) -> Mamba2Config:
    inner = int(value["expand"] * value["hidden_size"])
    mixer = Mamba2Config(
        inner_dim=inner,
        head_dim=value["head_dim"],
        state_dim=value["state_size"],
        num_groups=value["n_groups"],
        conv_width=value["conv_kernel"],
        conv_bias=value["use_conv_bias"],
        bias=value["use_bias"],
        norm="rms" if value["rmsnorm"] else "none",
        norm_before_gate=value["rmsnorm"] and value["norm_before_gate"],
        norm_eps=value["norm_eps"],
        time_step_min=value["dt_min"],
        time_step_max=value["dt_max"],
        time_step_floor=value["dt_init_floor"],
        **time_step_bounds(value["dt_limit"]),
    )
    if value["num_heads"] not in (None, mixer.num_heads):
        given = f"num_heads is {value['num_heads']}"
        refuse("Mamba2", [f"{given}; accepted: expand * hidden_size / head_dim = {mixer.num_heads}"])
    return mixer


_LINEAR: Names = {f"{name}_proj.{part}": (f"{name}_proj.{part}",) for name in "qkv" for part in ("weight", "bias")}
_OUT: Names = {"out_proj.weight": ("o_proj.weight",)}
_GATED: Names = {
    **_LINEAR,
    **_OUT,
    "gate_proj.weight": ("g_proj.weight",),
    "conv.weight": tuple(f"{name}_conv1d.weight" for name in "qkv"),
    "decay_proj.weight": ("gk_proj.weight",),
    "decay_proj.bias": ("gk_proj.bias",),
}


@dataclass(frozen=True)
class _Layer:
    """One of FLA's classes: the arguments of its constructor, our configuration of them, and its names of weights."""

    fields: Mapping[str, Field]
    config_of: Callable[[Mapping[str, Any]], MixerConfig]
    names: Names


LAYERS = {
    "MultiScaleRetention": _Layer(_RETENTION, _retention, _GATED),
    "SimpleGatedLinearAttention": _Layer(_SIMPLE_GLA, _simple_gla, _GATED),
    "YOCOGatedRetention": _Layer(_YOCO, _yoco, _GATED),
    "Mamba2": _Layer(
        _MAMBA2,
        _mamba2,
        {
            "in_proj.weight": ("in_proj.weight",), "in_proj.bias": ("in_proj.bias",), "conv.weight": ("conv1d.weight",),
            "conv.bias": ("conv1d.bias",), "log_rate": ("A_log",), "skip": ("D",), "time_step_bias": ("dt_bias",),
            "norm_weight": ("norm.weight",), "out_proj.weight": ("out_proj.weight",),
            "out_proj.bias": ("out_proj.bias",),
        },
    ),
    "Attention": _Layer(
        _ATTENTION,
        lambda value: attention_of(value, "Attention"),
        {**_LINEAR, **_OUT, "q_norm_weight": ("q_norm.weight",), "k_norm_weight": ("k_norm.weight",)},
    ),
}  # fmt: skip
# Of the head norm's weights: fused with the gate, and alone.
_HEAD_NORMS = ("g_norm_swish_gate.weight", "g_norm.weight")


def load_layer(kind: str, state: Mapping[str, Tensor], **options: Any) -> MixerModule:
    """One of FLA's layers as a mixer of ours, in evaluation mode.

    Args:
        kind: the name of FLA's class, a key of LAYERS.
        state: its state dict.
        options: the arguments of its constructor that are not the defaults.

    Raises ValueError that names options that our mixers lack, and tensors that are missing, left over, or of the wrong
    shape.
    """
    if kind not in LAYERS:
        raise ValueError(f"kind is {kind!r}; {choices(kind, LAYERS)}")
    layer = LAYERS[kind]
    unknown = sorted(options.keys() - layer.fields.keys())
    if unknown:
        raise ValueError(f"{kind} has no argument {unknown[0]!r}; {choices(unknown[0], sorted(layer.fields))}")
    value = read(kind, options, layer.fields)
    with torch.device("meta"):
        module = mixer_of(config := layer.config_of(value)).module(config, value["hidden_size"])
    weights = _weights(kind, module, layer.names, state)
    if value.get("rope_inv_freq") == "fla":
        for name in ("q_proj.weight", "k_proj.weight"):
            weights[name] = _halves(weights[name], value["num_heads"])
    module.load_state_dict(weights, assign=True)
    return module.eval()


def _weights(kind: str, module: MixerModule, names: Names, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names, each of theirs used once."""
    weights, used, problems = {}, set(), []
    for name, spec in module.named_parameters():
        parts = names.get(name, ())
        if name == "head_norm_weight":
            parts = (next((part for part in _HEAD_NORMS if part in state), _HEAD_NORMS[0]),)
        used.update(parts)
        missing = [part for part in parts if part not in state]
        if missing or not parts:
            problems.append(f"{missing[0] if missing else name} is missing")
            continue
        weights[name] = torch.cat([state[part].detach() for part in parts])
        if weights[name].shape != spec.shape:
            problems.append(f"{' with '.join(parts)} has shape {list(weights[name].shape)}, not {list(spec.shape)}")
    problems += [f"{name} is left over" for name in sorted(state.keys() - used)]
    refuse(f"these are not the weights of {kind} with these options", problems)
    return weights


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of heads whose neighbours rotate together, in the order in which their halves do."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
