"""transformers' and FLA's `MambaForCausalLM` and `Mamba2ForCausalLM`, and the authors' checkpoints with their names.

A layer is a mixer without a feed-forward. With `residual_in_fp32`, their half-precision models keep the residual stream
in float32. Ours keep it in the model's dtype, so half-precision logits differ by that rounding. flash-linear-attention
has the same tensors and other names of fields; `norm_eps` tells its configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retnet.layers.block import BlockConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import (
    Field,
    depth,
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
from retnet.models.convert.rms_model import rms_model
from retnet.models.convert.table import Format, Table

EMBEDDING = "backbone.embeddings.weight"
_SHARED: Table = {
    "embedding.weight": (EMBEDDING, "backbone.embedding.weight"),
    "layers.{}.mixer_norm.weight": "backbone.layers.{}.norm.weight",
    "layers.{}.mixer.in_proj.weight": "backbone.layers.{}.mixer.in_proj.weight",
    "layers.{}.mixer.in_proj.bias": "backbone.layers.{}.mixer.in_proj.bias",
    "layers.{}.mixer.conv.weight": "backbone.layers.{}.mixer.conv1d.weight",
    "layers.{}.mixer.conv.bias": "backbone.layers.{}.mixer.conv1d.bias",
    "layers.{}.mixer.log_rate": "backbone.layers.{}.mixer.A_log",
    "layers.{}.mixer.skip": "backbone.layers.{}.mixer.D",
    "layers.{}.mixer.out_proj.weight": "backbone.layers.{}.mixer.out_proj.weight",
    "layers.{}.mixer.out_proj.bias": "backbone.layers.{}.mixer.out_proj.bias",
    "final_norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}
NAMES1: Table = {
    **_SHARED,
    "layers.{}.mixer.x_proj.weight": "backbone.layers.{}.mixer.x_proj.weight",
    "layers.{}.mixer.time_step_proj.weight": "backbone.layers.{}.mixer.dt_proj.weight",
    "layers.{}.mixer.time_step_proj.bias": "backbone.layers.{}.mixer.dt_proj.bias",
}
NAMES2: Table = {
    **_SHARED,
    "layers.{}.mixer.time_step_bias": "backbone.layers.{}.mixer.dt_bias",
    "layers.{}.mixer.norm_weight": "backbone.layers.{}.mixer.norm.weight",
}

_SIZE = size()
_FIELDS = {
    "hidden_act": only("silu"),
    "conv_kernel": size(4),
    "expand": times(2),
    "hidden_size": size(768),
    "initializer_range": unit_interval(0.1),
    "layer_norm_epsilon": unit_interval(1e-5),
    "num_hidden_layers": depth(32),
    "state_size": size(16),
    "tie_word_embeddings": flag(True),
    "time_step_floor": positive(1e-4),
    "time_step_max": positive(0.1),
    "time_step_min": positive(0.001),
    "time_step_rank": Field("an integer, or 'auto'", lambda x: x == "auto" or _SIZE.check(x), "auto"),
    "time_step_scale": positive(1.0),
    "use_bias": flag(False),
    "use_conv_bias": flag(True),
    "vocab_size": size(),
    # Without effect on outputs: initialisation, ways to compute, values implied by other keys.
    "chunk_size": size(None), "intermediate_size": size(None), "layer_types": ignored("a list", list),
    "num_heads": size(None), "rescale_prenorm_residual": flag(False), "residual_in_fp32": flag(True),
    "time_step_init_scheme": ignored("text", str), "use_associative_scan": flag(True), "use_mambapy": flag(False),
}  # fmt: skip
_FIELDS1 = {"model_type": only("mamba"), **_FIELDS}
_FIELDS2 = {
    **_FIELDS,
    "model_type": only("mamba2"),
    "head_dim": size(64),
    "hidden_size": size(4096),
    "n_groups": size(8),
    "num_hidden_layers": depth(64),
    "state_size": size(128),
    "tie_word_embeddings": flag(False),
    "time_step_limit": time_steps(),
}
# FLA's names of fields, and its defaults and fields of its own.
_FLA_NAMES = {
    "layer_norm_epsilon": "norm_eps", "time_step_floor": "dt_init_floor", "time_step_init_scheme": "dt_init_scheme",
    "time_step_limit": "dt_limit", "time_step_max": "dt_max", "time_step_min": "dt_min", "time_step_rank": "dt_rank",
    "time_step_scale": "dt_scale",
}  # fmt: skip
_FLA1 = {
    "hidden_act": only("silu", "swish"),
    "hidden_size": size(2048),
    "initializer_range": unit_interval(0.02),
    "num_hidden_layers": depth(48),
    "tie_word_embeddings": flag(False),
    # without effect on outputs: training and kernels
    "fuse_cross_entropy": flag(False), "fuse_linear_cross_entropy": flag(False), "fuse_norm": flag(False),
    "use_l2warp": flag(False),
}  # fmt: skip
_FLA2 = {
    **_FLA1,
    "A_init_range": ignored("two numbers", (list, tuple)),
    "D_has_hdim": only(False),
    "conv_init": ignored("a number", (int, float)),
    "n_groups": size(1),
    "norm_before_gate": flag(False),
    "rmsnorm": flag(True),
}


def mamba1_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Mamba's config.json as our configuration."""
    value = _read("mamba", source, _FIELDS1, _FLA1)
    rank = value["time_step_rank"]
    mixer = Mamba1Config(
        inner_dim=_inner_dim("mamba", value),
        time_step_rank=math.ceil(value["hidden_size"] / 16) if rank == "auto" else rank,
        time_step_scale=value["time_step_scale"],
        **_mixer_options(value),
    )
    return _model("mamba", source, value, mixer)


def mamba2_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Mamba-2's config.json as our configuration."""
    value = _read("mamba2", source, _FIELDS2, _FLA2)
    normed = value.get("rmsnorm", True)
    mixer = Mamba2Config(
        inner_dim=_inner_dim("mamba2", value),
        head_dim=value["head_dim"],
        num_groups=value["n_groups"],
        norm="rms" if normed else "none",
        norm_before_gate=normed and value.get("norm_before_gate", False),
        norm_eps=value["layer_norm_epsilon"],
        **time_step_bounds(value["time_step_limit"]),
        **_mixer_options(value),
    )
    if value["num_heads"] not in (None, mixer.num_heads):
        refuse(
            "mamba2",
            [f"num_heads is {value['num_heads']}; accepted: expand * hidden_size / head_dim = {mixer.num_heads}"],
        )
    return _model("mamba2", source, value, mixer)


def _read(
    name: str, source: Mapping[str, Any], fields: Mapping[str, Field], of_fla: Mapping[str, Field]
) -> dict[str, Any]:
    """The values of the fields, under transformers' names."""
    if "norm_eps" not in source:
        return read(name, source, fields)
    value = read(name, source, {_FLA_NAMES.get(key, key): field for key, field in {**fields, **of_fla}.items()})
    ours = {theirs: key for key, theirs in _FLA_NAMES.items()}
    return {ours.get(key, key): given for key, given in value.items()}


def _inner_dim(name: str, value: Mapping[str, Any]) -> int:
    inner = int(value["expand"] * value["hidden_size"])
    if value["intermediate_size"] not in (None, inner):
        given = value["intermediate_size"]
        refuse(name, [f"intermediate_size is {given}; accepted: expand * hidden_size = {inner}"])
    return inner


def _mixer_options(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "state_dim": value["state_size"],
        "conv_width": value["conv_kernel"],
        "conv_bias": value["use_conv_bias"],
        "bias": value["use_bias"],
        "time_step_min": value["time_step_min"],
        "time_step_max": value["time_step_max"],
        "time_step_floor": value["time_step_floor"],
    }


def _model(
    name: str, source: Mapping[str, Any], value: Mapping[str, Any], mixer: Mamba1Config | Mamba2Config
) -> ModelConfig:
    norm_eps = value["layer_norm_epsilon"]
    layer = BlockConfig(mixer, feed_forward=None, norm="rms", norm_eps=norm_eps)
    return rms_model(name, source, value, (layer,) * value["num_hidden_layers"], norm_eps, {})


MAMBA1 = Format(
    name="mamba",
    names=lambda config: NAMES1,
    config_of=mamba1_config_of,
    marker="backbone.layers.0.mixer.x_proj.weight",
    embedding=EMBEDDING,
)
MAMBA2 = Format(
    name="mamba2",
    names=lambda config: NAMES2,
    config_of=mamba2_config_of,
    marker="backbone.layers.0.mixer.dt_bias",
    embedding=EMBEDDING,
)
