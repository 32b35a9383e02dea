"""transformers' Falcon-H1 (arXiv 2507.22448): a layer is the sum of a Mamba-2 and of attention, with factors (muP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.branched import BranchedConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.bamba import BAMBA_FIELDS, mamba2_of
from retnet.models.convert.fields import Field, flag, ignored, is_number, number, only, positive, read, refuse, size
from retnet.models.convert.hybrid_fields import heads_of, hybrid_model, inner_width
from retnet.models.convert.rope import rope_options


def _factors(count: int) -> Field:
    accepted = f"a list of {count} numbers, or null"
    return Field(accepted, lambda x: isinstance(x, list) and len(x) == count and all(map(is_number, x)), None)


_FACTOR = number(1.0, "a number", lambda x: True)
_FIELDS = {
    **{key: field for key, field in BAMBA_FIELDS.items() if key not in ("attn_layer_indices", "attn_rotary_emb")},
    "attention_in_multiplier": _FACTOR,
    "attention_out_multiplier": _FACTOR,
    "embedding_multiplier": _FACTOR,
    "key_multiplier": positive(1.0),
    "lm_head_multiplier": positive(1.0),
    "mamba_d_ssm": size(1024, null=None),
    "mamba_norm_before_gate": flag(True),
    "mamba_rms_norm": flag(False),
    "mamba_use_mlp": only(True),
    "max_position_embeddings": size(8192),
    "mlp_expansion_factor": ignored("a number", (int, float)),  # intermediate_size is given
    "mlp_multipliers": _factors(2),
    "partial_rotary_factor": only(1, None),
    "projectors_bias": flag(False),
    "ssm_in_multiplier": _FACTOR,
    "ssm_multipliers": _factors(5),
    "ssm_out_multiplier": _FACTOR,
}


def falcon_h1_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Falcon-H1's config.json as our configuration."""
    value = read("falcon_h1", source, _FIELDS)
    heads, norm_eps = heads_of("falcon_h1", value), value["rms_norm_eps"]
    if value["projectors_bias"] != value["mamba_proj_bias"]:
        biases = f"mamba_proj_bias is {value['mamba_proj_bias']}, projectors_bias {value['projectors_bias']}"
        refuse("falcon_h1", [f"{biases}; accepted: equal values"])
    scan = mamba2_of(
        "falcon_h1",
        value,
        value["mamba_d_ssm"] or inner_width("falcon_h1", value),
        norm="rms" if value["mamba_rms_norm"] else "none",
        norm_before_gate=value["mamba_rms_norm"] and value["mamba_norm_before_gate"],
        norm_eps=norm_eps,
        projection_scales=_unless_all_one(value["ssm_multipliers"]),
    )
    key_factor = value["key_multiplier"]
    attention = AttentionConfig(
        **heads,
        **rope_options("falcon_h1", value),
        rotary="half",
        qkv_bias=value["attention_bias"],
        out_bias=value["attention_bias"],
        scale=None if key_factor == 1 else key_factor * heads["head_dim"] ** -0.5,
    )
    gate_scale, down_scale = map(float, value["mlp_multipliers"] or (1, 1))
    layer = BlockConfig(
        BranchedConfig(
            (scan, attention),
            input_scales=_unless_all_one((value["ssm_in_multiplier"], value["attention_in_multiplier"])) or (),
            output_scales=_unless_all_one((value["ssm_out_multiplier"], value["attention_out_multiplier"])) or (),
        ),
        FeedForwardConfig(
            value["intermediate_size"],
            gated=True,
            activation="swish",
            bias=value["mlp_bias"],
            gate_scale=gate_scale,
            down_scale=down_scale,
        ),
        norm="rms",
        norm_eps=norm_eps,
    )
    scales = {
        "embedding_scale": float(value["embedding_multiplier"]), "logit_scale": float(value["lm_head_multiplier"])
    }  # fmt: skip
    return hybrid_model("falcon_h1", source, value, [layer] * value["num_hidden_layers"], **scales)


def _unless_all_one(factors: Sequence[float] | None) -> tuple[float, ...] | None:
    """Factors, None where they change nothing."""
    return None if factors is None or all(factor == 1 for factor in factors) else tuple(map(float, factors))
