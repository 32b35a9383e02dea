"""transformers' hybrids of attention and Mamba: Jamba (Mamba-1, experts) and Bamba (Mamba-2).

Their blocks share the names of tensors, by which they are recognised; `model_type` says which of them a model is.
Jamba's attention has no positions, and its scans norm dt, B and C. Bamba rotates the first half of each head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.mixer_base import MixerConfig
from retnet.layers.moe import MoEConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import (
    Field,
    at_least_zero,
    choice,
    depth,
    flag,
    only,
    rate,
    read,
    refuse,
    size,
    time_step_bounds,
    time_steps,
    times,
    token_ids,
    unit_interval,
)  # fmt: skip
from retnet.models.convert.rope import ROPE_FIELDS, rope_options
from retnet.models.convert.table import Format, Part, Table
from retnet.system.checks import is_integer

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
    "final_norm.weight": "model.final_layernorm.weight",
    "head.weight": "lm_head.weight",
}  # fmt: skip

_SHARED = {
    "attention_dropout": rate(0.0),
    "head_dim": size(None),
    "hidden_act": only("silu", "swish"),
    "hidden_size": size(4096),
    "initializer_range": unit_interval(0.02),
    "intermediate_size": size(14336),
    "mamba_conv_bias": flag(True),
    "mamba_d_conv": size(4),
    "mamba_expand": times(2),
    "mamba_proj_bias": flag(False),
    "num_attention_heads": size(32),
    "num_hidden_layers": depth(32),
    "num_key_value_heads": size(8, null=None),
    "tie_word_embeddings": flag(False),
    "vocab_size": size(),
    # without effect on outputs: how many logits a call computes, kernels
    "calc_logits_for_entire_prompt": flag(False), "mamba_chunk_size": size(None), "num_logits_to_keep": size(None),
    "use_associative_scan": flag(True), "use_mamba_kernels": flag(True), "use_mambapy": flag(False),
}  # fmt: skip
_JAMBA = {
    **_SHARED,
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
_BAMBA = {
    **_SHARED,
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


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    kinds = {"jamba": jamba_config_of, "bamba": bamba_config_of}
    kind = choice(None, *kinds).read(source, "model_type")
    if kind is None:
        raise ValueError(f"model_type is missing; accepted: {', '.join(kinds)}")
    return kinds[kind](source)


def jamba_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Jamba's config.json as our configuration."""
    value = read("jamba", source, _JAMBA)
    width, num_layers, experts = value["hidden_size"], value["num_hidden_layers"], value["num_experts"]
    attends, routes = (_every("jamba", value, kind) for kind in ("attn", "expert"))
    rank, norm_eps = value["mamba_dt_rank"], value["rms_norm_eps"]
    scan = Mamba1Config(
        inner_dim=_inner_dim("jamba", value),
        time_step_rank=math.ceil(width / 16) if rank == "auto" else rank,
        scan_norm="rms",
        scan_norm_eps=norm_eps,
        **_mamba_options(value),
    )
    attention = AttentionConfig(**_heads("jamba", value), rotary="none")
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
    return _model("jamba", source, value, layers)


def bamba_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """A Bamba's config.json as our configuration."""
    value = read("bamba", source, _BAMBA)
    num_layers, norm_eps = value["num_hidden_layers"], value["rms_norm_eps"]
    heads = _heads("bamba", value)
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
        False: mamba2_of("bamba", value, _inner_dim("bamba", value), norm_eps=norm_eps),
    }
    feed_forward = FeedForwardConfig(value["intermediate_size"], gated=True, activation="swish", bias=value["mlp_bias"])
    blocks = {kind: BlockConfig(x, feed_forward, norm="rms", norm_eps=norm_eps) for kind, x in mixers.items()}
    attends = set(value["attn_layer_indices"] or ())
    return _model("bamba", source, value, [blocks[i in attends] for i in range(num_layers)])


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
        **_mamba_options(value),
        **options,
    )


def _every(name: str, value: Mapping[str, Any], kind: str) -> set[int]:
    """The layers of one kind, from its period and its offset."""
    period, offset = value[f"{kind}_layer_period"], value[f"{kind}_layer_offset"]
    if offset >= period:
        refuse(name, [f"{kind}_layer_offset is {offset}; accepted: below {kind}_layer_period ({period})"])
    return set(range(offset, value["num_hidden_layers"], period))


def _inner_dim(name: str, value: Mapping[str, Any]) -> int:
    inner = value["mamba_expand"] * value["hidden_size"]
    if inner != int(inner):
        refuse(name, [f"mamba_expand is {value['mamba_expand']}; accepted: an integer times hidden_size"])
    return int(inner)


def _heads(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of AttentionConfig that its heads give."""
    width, heads = value["hidden_size"], value["num_attention_heads"]
    if value["head_dim"] is None and width % heads:
        refuse(name, [f"num_attention_heads is {heads}; accepted: a divisor of hidden_size {width}"])
    return {
        "num_heads": heads,
        "num_kv_heads": value["num_key_value_heads"] or heads,
        "head_dim": value["head_dim"] or width // heads,
        "dropout": value["attention_dropout"],
    }


def _mamba_options(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "state_dim": value["mamba_d_state"],
        "conv_width": value["mamba_d_conv"],
        "conv_bias": value["mamba_conv_bias"],
        "bias": value["mamba_proj_bias"],
    }


def _model(
    name: str, source: Mapping[str, Any], value: Mapping[str, Any], layers: list[BlockConfig], **options: Any
) -> ModelConfig:
    return ModelConfig(
        vocab_size=value["vocab_size"],
        d_model=value["hidden_size"],
        layers=tuple(layers),
        name=name,
        tie_embeddings=value["tie_word_embeddings"],
        final_norm="rms",
        norm_eps=value["rms_norm_eps"],
        init="normal",
        init_std=value["initializer_range"],
        **token_ids(source, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        **options,
    )


FORMAT = Format(
    name="hybrid",
    names=lambda config: NAMES,
    config_of=config_of,
    marker="model.layers.0.pre_ff_layernorm.weight",
    embedding=EMBEDDING,
    model_types=("jamba", "bamba"),
)
