"""Ling- and Ring-linear 2.0 (`bailing_moe_linear`, arXiv 2510.19338), as their published modeling code computes them.

Groups of layers end with softmax attention; the others are lightning attention, which is retention with decays from
ALiBi's slopes. The norm of its output takes groups of heads together. Both rotate a part of each head. All but the
first feed-forwards are mixtures of experts with a shared expert, groups, and a bias for the choice of experts.

The published code scales the slopes of layer l (from 0) of L by 1 - (l - 1) / (L - 1) + 1e-5. SGLang and vLLM write l
in place of l - 1, so their decays are slightly slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.moe import MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import (
    Field,
    at_least_zero,
    depth,
    flag,
    head_problems,
    head_width,
    ignored,
    number,
    only,
    positive,
    rate,
    read,
    refuse,
    size,
    unit_interval,
)  # fmt: skip
from retnet.models.convert.rms_model import rms_model
from retnet.models.convert.rope import ROPE_FIELDS, rope_options
from retnet.models.convert.table import Format, Part, Table

NAME = "bailing_moe_linear"
EMBEDDING = "model.word_embeddings.weight"
_MIXER, _FED = "model.layers.{}.attention", "model.layers.{}.mlp"
_NO, _YES = only(False), only(True)

_FIELDS: dict[str, Field] = {
    "attention_dropout": rate(0.0),
    "embedding_dropout": only(0),
    "first_k_dense_replace": size(0, least=0),
    "group_norm_size": size(1),
    "head_dim": size(None),
    "hidden_act": only("silu"),
    "hidden_size": size(),
    "initializer_range": unit_interval(0.02),
    "intermediate_size": size(),
    "kv_lora_rank": only(None),  # latent attention, as in Ring 2.5
    "layer_group_size": size(1),
    "linear_rope": _YES,
    "linear_silu": _NO,
    "max_position_embeddings": size(32768),
    "moe_intermediate_size": size(None),
    "moe_router_bias_update_rate": at_least_zero(0.001),
    "moe_router_enable_expert_bias": _YES,
    "moe_router_enable_routed_scaling": _YES,
    "moe_router_enable_shared_expert": _YES,
    "moe_shared_expert_intermediate_size": size(None),
    "n_group": size(1),
    "norm_head": _NO,
    "norm_topk_prob": _YES,
    "num_attention_heads": size(),
    "num_experts": size(1),
    "num_experts_per_tok": size(1),
    "num_hidden_layers": depth(0),
    "num_key_value_heads": size(None),
    "num_nextn_predict_layers": only(0),
    "num_shared_experts": size(0, least=0),
    "output_dropout": only(0),
    "q_lora_rank": only(None),
    "partial_rotary_factor": number(1.0, "a number above 0, at most 1", lambda x: 0 < x <= 1),
    "rms_norm_eps": unit_interval(1e-6),
    **ROPE_FIELDS,
    "rotary_dim": size(None),
    "routed_scaling_factor": positive(1.0),
    "score_function": only("sigmoid"),
    "sliding_window": only(None),
    "tie_word_embeddings": flag(False),
    "topk_group": size(1),
    "use_bias": _NO,
    "use_linear_silu": _NO,
    "use_qk_norm": flag(True),
    "use_qkv_bias": _NO,
    "use_rmsnorm": _YES,
    "use_sliding_window": _NO,
    "using_split_qkv_in_self_attention": _NO,
    "vocab_size": size(),
    # Without effect on outputs: kernels, precision of the router (ours is float32), losses of training.
    "linear_backend": ignored("text", str), "linear_mode": ignored("text", str), "max_window_layers": size(None),
    "mtp_loss_scaling_factor": at_least_zero(0.0), "norm_softmax": flag(False), "output_router_logits": flag(False),
    "pretraining_tp": size(1), "router_dtype": ignored("text", str), "router_type": ignored("text", str),
    "topk_method": ignored("text", str),
}  # fmt: skip


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    value = read(NAME, source, _FIELDS)
    _check(value)
    L, period, norm_eps = value["num_hidden_layers"], value["layer_group_size"], value["rms_norm_eps"]
    dense = FeedForwardConfig(value["intermediate_size"], gated=True, activation="swish")
    experts = _experts(value)
    whole_groups = L // period * period
    layers = []
    for i in range(L):
        is_softmax = (i + 1) % period == 0 or i >= whole_groups
        mixer = _attention(value) if is_softmax else _lightning(value, i)
        feed_forward = experts if i >= value["first_k_dense_replace"] and experts is not None else dense
        layers.append(BlockConfig(mixer, feed_forward, norm="rms", norm_eps=norm_eps))
    return rms_model(NAME, source, value, layers, norm_eps, {})


def _attention(value: Mapping[str, Any]) -> AttentionConfig:
    heads = value["num_attention_heads"]
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=value["num_key_value_heads"] or heads,
        head_dim=head_width(value),
        dropout=value["attention_dropout"],
        **_shared_options(value),
    )


def _lightning(value: Mapping[str, Any], layer: int) -> RetentionConfig:
    heads = value["num_attention_heads"]
    width = heads * head_width(value)
    return RetentionConfig(
        num_heads=heads,
        key_dim=width,
        value_dim=width,
        decay="alibi",
        decay_scale=1 - (layer - 1) / (value["num_hidden_layers"] - 1) + 1e-5,
        gate="sigmoid",
        head_norm="rms",
        head_norm_affine="per_head",
        head_norm_eps=value["rms_norm_eps"],
        head_norm_groups=value["group_norm_size"],
        **_shared_options(value),
    )


def _shared_options(value: Mapping[str, Any]) -> dict[str, Any]:
    """The norm and the rotation of q and k, which both mixers have."""
    head_dim, partial = head_width(value), value["partial_rotary_factor"]
    rotated = value["rotary_dim"] or int(head_dim * partial)
    rope = rope_options(NAME, {**value, "rope_theta": value["rope_theta"] or 600000.0}, partial)
    if "rotary_scaling" in rope:
        refuse(NAME, ["rope_scaling has type 'yarn' or 'llama3'; accepted: none, 'default' or 'linear'"])
    return {
        "rotary": "half",
        "rotary_dim": None if rotated == head_dim else rotated,
        "qk_norm": "rms" if value["use_qk_norm"] else "none",
        "qk_norm_eps": value["rms_norm_eps"],
        **rope,
    }


def _experts(value: Mapping[str, Any]) -> MoEConfig | None:
    if value["num_experts"] == 1:
        return None
    return MoEConfig(
        num_experts=value["num_experts"],
        top_k=value["num_experts_per_tok"],
        hidden_dim=value["moe_intermediate_size"],
        router="sigmoid",
        routed_scale=value["routed_scaling_factor"],
        shared_hidden_dim=value["num_shared_experts"] * value["moe_intermediate_size"] or None,
        num_groups=value["n_group"],
        top_groups=value["topk_group"],
        bias_update_rate=value["moe_router_bias_update_rate"],
        load_balance_coef=0.0,
    )


def _check(value: Mapping[str, Any]) -> None:
    heads, experts = value["num_attention_heads"], value["num_experts"]
    inner, shared = value["moe_intermediate_size"], value["moe_shared_expert_intermediate_size"]
    problems = head_problems(value)
    if value["num_hidden_layers"] < 2:
        problems.append(f"num_hidden_layers is {value['num_hidden_layers']}; accepted: 2 or more")
    if heads % value["group_norm_size"]:
        problems.append(
            f"group_norm_size is {value['group_norm_size']}; accepted: a divisor of num_attention_heads {heads}"
        )
    if experts > 1 and inner is None:
        problems.append(f"moe_intermediate_size is missing with num_experts {experts}; accepted: a positive integer")
    if shared not in (None, inner):
        problems.append(f"moe_shared_expert_intermediate_size is {shared}; accepted: moe_intermediate_size {inner}")
    refuse(NAME, problems)


def names(config: ModelConfig) -> Table:
    """The table. q, k and v are one tensor; in softmax attention, k and v may have fewer heads."""
    fused = f"{_MIXER}.query_key_value.weight"
    softmax = next((x.mixer for x in config.layers if isinstance(x.mixer, AttentionConfig)), None)
    rows = None
    if softmax is not None:
        rows = tuple(n * softmax.head_dim for n in (softmax.num_heads, softmax.num_kv_heads, softmax.num_kv_heads))
    return {
        "embedding.weight": (EMBEDDING, "model.embed_tokens.weight"),
        "layers.{}.mixer_norm.weight": "model.layers.{}.input_layernorm.weight",
        **{
            f"layers.{{}}.mixer.{name}_proj.weight": (Part(fused, i, rows or 3), Part(fused, i, 3))
            for i, name in enumerate("qkv")
        },
        "layers.{}.mixer.q_norm_weight": f"{_MIXER}.query_layernorm.weight",
        "layers.{}.mixer.k_norm_weight": f"{_MIXER}.key_layernorm.weight",
        "layers.{}.mixer.gate_proj.weight": f"{_MIXER}.g_proj.weight",
        "layers.{}.mixer.head_norm_weight": Part(f"{_MIXER}.g_norm.weight", flat=True),
        "layers.{}.mixer.out_proj.weight": f"{_MIXER}.dense.weight",
        "layers.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.feed_forward.router.weight": f"{_FED}.gate.weight",
        "layers.{}.feed_forward.routing_bias": f"{_FED}.gate.expert_bias",
        **{
            f"layers.{{}}.feed_forward.{ours}{name}_proj.weight": tuple(
                f"{_FED}.{place}{name}_proj.weight" for place in theirs
            )
            for name in ("gate", "up", "down")
            for ours, theirs in (("", ("experts.[].", "")), ("shared.", ("shared_experts.",)))
        },
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }


FORMAT = Format(
    name=NAME,
    names=names,
    config_of=config_of,
    marker="model.layers.0.attention.g_proj.weight",
    embedding=EMBEDDING,
    model_types=(NAME,),
)
