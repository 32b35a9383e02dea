"""transformers' `MambaForCausalLM` and `Mamba2ForCausalLM`, and the authors' checkpoints with these tensor names.

A layer is a mixer without a feed-forward. With `residual_in_fp32`, their half-precision models keep the residual stream
in float32. Ours keep it in the model's dtype, so half-precision logits differ by that rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retnet.layers.block import BlockConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.models.config import ModelConfig
from retnet.models.convert.table import Format, Table, refuse, token_ids, unsupported, warn_unknown

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

_DEFAULTS = {
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "initializer_range": 0.1,
    "time_step_rank": "auto",
    "time_step_scale": 1.0,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "tie_word_embeddings": True,
}
_DEFAULTS2 = {
    **_DEFAULTS,
    "hidden_size": 4096,
    "head_dim": 64,
    "n_groups": 8,
    "state_size": 128,
    "num_hidden_layers": 64,
    "time_step_limit": (0.0, math.inf),
    "tie_word_embeddings": False,
}
# Keys that are read above or do not change outputs: initialisation, ways to compute, values implied by other keys.
_FREE = {
    "bos_token_id", "chunk_size", "eos_token_id", "hidden_act", "intermediate_size", "layer_types", "num_heads",
    "pad_token_id", "rescale_prenorm_residual", "residual_in_fp32", "time_step_init_scheme", "use_associative_scan",
    "use_mambapy", "vocab_size",
}  # fmt: skip


def mamba1_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Mamba's config.json as our configuration."""
    value = _read("mamba", source, _DEFAULTS)
    rank = value["time_step_rank"]
    mixer = Mamba1Config(
        inner_dim=int(value["expand"] * value["hidden_size"]),
        time_step_rank=math.ceil(value["hidden_size"] / 16) if rank == "auto" else rank,
        time_step_scale=value["time_step_scale"],
        **_mixer_options(value),
    )
    return _model("mamba", source, value, mixer)


def mamba2_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Mamba-2's config.json as our configuration."""
    value = _read("mamba2", source, _DEFAULTS2)
    lowest, highest = (_number(x) for x in value["time_step_limit"])
    mixer = Mamba2Config(
        inner_dim=int(value["expand"] * value["hidden_size"]),
        head_dim=value["head_dim"],
        num_groups=value["n_groups"],
        norm_eps=value["layer_norm_epsilon"],
        time_step_lowest=lowest,
        time_step_highest=None if highest == math.inf else highest,
        **_mixer_options(value),
    )
    heads = source.get("num_heads", mixer.num_heads)
    if heads != mixer.num_heads:
        refuse("mamba2", [f"num_heads is {heads}; accepted: expand * hidden_size / head_dim = {mixer.num_heads}"])
    return _model("mamba2", source, value, mixer)


def _read(name: str, source: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    refuse(name, unsupported(source, {"model_type": name, "hidden_act": "silu"}))
    warn_unknown(name, source, {*defaults, *_FREE})
    return {key: default if source.get(key) is None else source[key] for key, default in defaults.items()}


def _number(x: Any) -> float:
    """A number in a config.json; transformers 5 writes infinity as a mapping."""
    return float(x["__float__"]) if isinstance(x, Mapping) else float(x)


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
    eps = value["layer_norm_epsilon"]
    layer = BlockConfig(mixer, feed_forward=None, norm="rms", norm_eps=eps)
    return ModelConfig(
        vocab_size=source["vocab_size"],
        d_model=value["hidden_size"],
        layers=(layer,) * value["num_hidden_layers"],
        name=name,
        tie_embeddings=value["tie_word_embeddings"],
        final_norm="rms",
        norm_eps=eps,
        init="normal",
        init_std=value["initializer_range"],
        **token_ids(source),
    )


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
