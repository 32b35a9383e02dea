"""transformers' Jamba (arXiv 2403.19887): Mamba-1 with normed scans, attention without positions, and experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.moe import MoEConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import Field, at_least_zero, flag, only, read, refuse, size, unit_interval
from retnet.models.convert.hybrid_fields import SHARED_FIELDS, heads_of, hybrid_model, inner_width, mamba_options
from retnet.system.checks import is_integer

_FIELDS = {
    **SHARED_FIELDS,
    "attn_layer_offset": size(4, least=0),
    "attn_layer_period": size(8),
    "expert_layer_offset": size(1, least=0),
    "expert_layer_period": size(2),
    "mamba_d_state": size(16),
    "mamba_dt_rank": Field("an integer, or 'auto'", lambda x: x == "auto" or is_integer(x, 1, 2**31 - 1), "auto"),
    "mamba_inner_layernorms": only(True),
    "max_position_embeddings": size(None),
    "num_experts": size(16),
    "num_experts_per_tok": size(2),
    "output_router_logits": flag(False),
    "rms_norm_eps": unit_interval(1e-6),
    "router_aux_loss_coef": at_least_zero(0.001),
}


def jamba_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Jamba's config.json as our configuration."""
    value = read("jamba", source, _FIELDS)
    width, num_layers, experts = value["hidden_size"], value["num_hidden_layers"], value["num_experts"]
    attends, routes = (_every("jamba", value, kind) for kind in ("attn", "expert"))
    rank, norm_eps = value["mamba_dt_rank"], value["rms_norm_eps"]
    scan = Mamba1Config(
        inner_dim=inner_width("jamba", value),
        time_step_rank=math.ceil(width / 16) if rank == "auto" else rank,
        scan_norm="rms",
        scan_norm_eps=norm_eps,
        **mamba_options(value),
    )
    attention = AttentionConfig(**heads_of("jamba", value), rotary="none")
    dense = FeedForwardConfig(value["intermediate_size"], gated=True, activation="swish")
    if value["num_experts_per_tok"] > experts:
        refuse("jamba", [f"num_experts_per_tok is {value['num_experts_per_tok']}; accepted: 1 to {experts}"])
    routed = MoEConfig(
        experts,
        value["num_experts_per_tok"],
        value["intermediate_size"],
        normalize_weights=False,
        load_balance_coef=value["router_aux_loss_coef"] if value["output_router_logits"] else 0.0,
    )
    layers = [
        BlockConfig(
            attention if i in attends else scan,
            routed if experts > 1 and i in routes else dense,
            norm="rms",
            norm_eps=norm_eps,
        )
        for i in range(num_layers)
    ]
    return hybrid_model("jamba", source, value, layers)


def _every(name: str, value: Mapping[str, Any], kind: str) -> set[int]:
    """The layers of one kind, from its period and its offset."""
    period, offset = value[f"{kind}_layer_period"], value[f"{kind}_layer_offset"]
    if offset >= period:
        refuse(name, [f"{kind}_layer_offset is {offset}; accepted: below {kind}_layer_period ({period})"])
    return set(range(offset, value["num_hidden_layers"], period))
