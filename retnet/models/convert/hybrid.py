"""Names of tensors in transformers' hybrids of attention and Mamba: Jamba, Bamba, Falcon-H1 and Zamba2.

Their blocks share the names, by which they are recognised; `model_type` says which of them a model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet.models.config import ModelConfig
from retnet.models.convert.bamba import bamba_config_of
from retnet.models.convert.falcon_h1 import falcon_h1_config_of
from retnet.models.convert.fields import choice
from retnet.models.convert.jamba import jamba_config_of
from retnet.models.convert.table import Format, Part, Table
from retnet.models.convert.zamba2 import zamba2_config_of

EMBEDDING = "model.embed_tokens.weight"
_LAYER = "model.layers.{}."
_MAMBA, _ATTENTION, _FFN = f"{_LAYER}mamba.", f"{_LAYER}self_attn.", f"{_LAYER}feed_forward."
_EXPERTS = f"{_FFN}experts."
_FUSED = f"{_EXPERTS}gate_up_proj"  # of a model in memory; files have each expert's own tensors
NAMES: Table = {
    "embedding.weight": EMBEDDING,
    "layers.{}.mixer_norm.weight": f"{_LAYER}input_layernorm.weight",
    "layers.{}.feed_forward_norm.weight": f"{_LAYER}pre_ff_layernorm.weight",
    **{
        f"layers.{{}}.mixer.{name}_proj.{part}": f"{_ATTENTION}{name}_proj.{part}"
        for name in "qkv" for part in ("weight", "bias")
    },
    **{
        f"layers.{{}}.mixer.out_proj.{part}": (f"{_MAMBA}out_proj.{part}", f"{_ATTENTION}o_proj.{part}")
        for part in ("weight", "bias")
    },
    "layers.{}.mixer.in_proj.weight": f"{_MAMBA}in_proj.weight",
    "layers.{}.mixer.in_proj.bias": f"{_MAMBA}in_proj.bias",
    "layers.{}.mixer.conv.weight": f"{_MAMBA}conv1d.weight",
    "layers.{}.mixer.conv.bias": f"{_MAMBA}conv1d.bias",
    "layers.{}.mixer.log_rate": f"{_MAMBA}A_log",
    "layers.{}.mixer.skip": f"{_MAMBA}D",
    "layers.{}.mixer.x_proj.weight": f"{_MAMBA}x_proj.weight",
    "layers.{}.mixer.time_step_proj.weight": f"{_MAMBA}dt_proj.weight",
    "layers.{}.mixer.time_step_proj.bias": f"{_MAMBA}dt_proj.bias",
    "layers.{}.mixer.step_norm_weight": f"{_MAMBA}dt_layernorm.weight",
    "layers.{}.mixer.write_norm_weight": f"{_MAMBA}b_layernorm.weight",
    "layers.{}.mixer.read_norm_weight": f"{_MAMBA}c_layernorm.weight",
    "layers.{}.mixer.time_step_bias": f"{_MAMBA}dt_bias",
    "layers.{}.mixer.norm_weight": f"{_MAMBA}norm.weight",
    "layers.{}.feed_forward.router.weight": f"{_FFN}router.weight",
    "layers.{}.feed_forward.gate_proj.weight": (
        f"{_FFN}gate_proj.weight", f"{_EXPERTS}[].gate_proj.weight", Part(_FUSED, 0, 2, dim=1)
    ),
    "layers.{}.feed_forward.up_proj.weight": (
        f"{_FFN}up_proj.weight", f"{_EXPERTS}[].up_proj.weight", Part(_FUSED, 1, 2, dim=1)
    ),
    "layers.{}.feed_forward.down_proj.weight": (
        f"{_FFN}down_proj.weight", f"{_EXPERTS}[].down_proj.weight", f"{_EXPERTS}down_proj"
    ),
    **{f"layers.{{}}.feed_forward.{name}_proj.bias": f"{_FFN}{name}_proj.bias" for name in ("gate", "up", "down")},
    # Falcon-H1
    **{
        f"layers.{{}}.mixer.branches.0.{ours}": f"{_MAMBA}{theirs}"
        for ours, theirs in (
            ("in_proj.weight", "in_proj.weight"), ("in_proj.bias", "in_proj.bias"), ("conv.weight", "conv1d.weight"),
            ("conv.bias", "conv1d.bias"), ("log_rate", "A_log"), ("skip", "D"), ("time_step_bias", "dt_bias"),
            ("norm_weight", "norm.weight"), ("out_proj.weight", "out_proj.weight"), ("out_proj.bias", "out_proj.bias"),
        )
    },
    **{
        f"layers.{{}}.mixer.branches.1.{ours}_proj.{part}": f"{_ATTENTION}{theirs}_proj.{part}"
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")) for part in ("weight", "bias")
    },
    "final_norm.weight": "model.final_layernorm.weight",
    "head.weight": "lm_head.weight",
}  # fmt: skip

_MODELS = {
    "jamba": jamba_config_of,
    "bamba": bamba_config_of,
    "falcon_h1": falcon_h1_config_of,
    "zamba2": zamba2_config_of,
}


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    kind = choice(None, *_MODELS).read(source, "model_type")
    if kind is None:
        raise ValueError(f"model_type is missing; accepted: {', '.join(_MODELS)}")
    return _MODELS[kind](source)


FORMAT = Format(
    name="hybrid",
    names=lambda config: NAMES,
    config_of=config_of,
    marker="model.layers.0.pre_ff_layernorm.weight",
    embedding=EMBEDDING,
    model_types=tuple(_MODELS),
)
