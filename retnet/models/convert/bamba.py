"""transformers' Bamba: Mamba-2, and attention that rotates the first half of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixer_base import MixerConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import (
    Field,
    at_least_zero,
    flag,
    only,
    read,
    refuse,
    size,
    time_step_bounds,
    time_steps,
    unit_interval,
)
from retnet.models.convert.hybrid_fields import SHARED_FIELDS, heads_of, hybrid_model, inner_width, mamba_options
from retnet.models.convert.rope import ROPE_FIELDS, rope_options
from retnet.system.checks import is_integer

BAMBA_FIELDS = {
    **SHARED_FIELDS,
    "attention_bias": flag(False),
    "attn_layer_indices": Field(
        "a list of layer numbers, or null", lambda x: isinstance(x, list) and all(is_integer(i, 0) for i in x), None
    ),
    "attn_rotary_emb": size(None),
    "mamba_d_head": Field("an integer, or 'auto'", lambda x: x == "auto" or is_integer(x, 1, 2**31 - 1), "auto"),
    "mamba_d_state": size(256),
    "mamba_n_groups": size(1),
    "mamba_n_heads": size(128),
    "max_position_embeddings": size(262144),
    "mlp_bias": flag(False),
    **ROPE_FIELDS,
    "partial_rotary_factor": only(0.5, None),
    "rms_norm_eps": unit_interval(1e-5),
    "time_step_limit": time_steps(),
    "z_loss_coefficient": at_least_zero(0.0),  # of training
}


def bamba_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Bamba's config.json as our configuration."""
    value = read("bamba", source, BAMBA_FIELDS)
    num_layers, norm_eps = value["num_hidden_layers"], value["rms_norm_eps"]
    heads = heads_of("bamba", value)
    rotary = rope_options("bamba", value, partial=0.5)
    turned = heads["head_dim"] // 2
    problems = [f"attn_layer_indices has {i}; accepted: 0 to {num_layers - 1}"
                for i in value["attn_layer_indices"] or () if i >= num_layers]  # fmt: skip
    if value["attn_rotary_emb"] not in (None, turned):
        problems.append(f"attn_rotary_emb is {value['attn_rotary_emb']}; accepted: half of the heads' width, {turned}")
    refuse("bamba", problems)
    mixers: dict[bool, MixerConfig] = {
        True: AttentionConfig(
            **heads,
            **rotary,
            rotary="half",
            rotary_dim=turned,
            qkv_bias=value["attention_bias"],
            out_bias=value["attention_bias"],
        ),
        False: mamba2_of("bamba", value, inner_width("bamba", value), norm_eps=norm_eps),
    }
    feed_forward = FeedForwardConfig(value["intermediate_size"], gated=True, activation="swish", bias=value["mlp_bias"])
    blocks = {kind: BlockConfig(x, feed_forward, norm="rms", norm_eps=norm_eps) for kind, x in mixers.items()}
    attends = set(value["attn_layer_indices"] or ())
    return hybrid_model("bamba", source, value, [blocks[i in attends] for i in range(num_layers)])


def mamba2_of(name: str, value: Mapping[str, Any], inner: int, **options: Any) -> Mamba2Config:
    """The Mamba-2 of Bamba's fields. Raises ValueError where heads, their width and their sum disagree."""
    heads, width, groups = value["mamba_n_heads"], value["mamba_d_head"], value["mamba_n_groups"]
    width = inner // heads if width == "auto" else width
    if heads * width != inner:
        given = f"mamba_n_heads is {heads}, mamba_d_head {value['mamba_d_head']}"
        refuse(name, [f"{given}; accepted: a product of {inner}"])
    return Mamba2Config(
        inner_dim=inner,
        head_dim=width,
        num_groups=groups,
        **time_step_bounds(value["time_step_limit"]),
        **mamba_options(value),
        **options,
    )
