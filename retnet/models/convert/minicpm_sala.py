"""MiniCPM-SALA 9B (`minicpm_sala`), within the context in which its sparse attention is dense.

Most layers are lightning attention: retention with decays from ALiBi's slopes, equal in all layers, norms of q and k, a
norm over all heads and a sigmoid gate, with rotary positions. The others are InfLLM-v2, which below `dense_len` tokens
is softmax attention, here without positions and with a sigmoid gate. Longer sequences would need its sparse form, which
our layers do not have: such a model refuses them (`max_context`).

The scalings of muP (arXiv 2404.06395): embeddings times scale_emb, branches times scale_depth / sqrt(L), logits divided
by hidden_size / dim_model_base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import (
    Field,
    choice,
    depth,
    flag,
    head_problems,
    head_width,
    ignored,
    mapping,
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
from retnet.system.checks import is_integer, quoted

NAME = "minicpm_sala"
EMBEDDING = "model.embed_tokens.weight"
_MIXER, _FED = "model.layers.{}.self_attn", "model.layers.{}.mlp"
_SPARSE, _LIGHTNING = ("minicpm4",), ("lightning-attn", "lightning", "lightning_attn")
_SCALES = {"1/sqrt(d)": 0.5, "1/d": 1.0, "1": 0.0}  # of q, as the power of 1 / d

_FIELDS: dict[str, Field] = {
    "attention_bias": only(False),
    "attention_dropout": rate(0.0),
    "attn_use_output_gate": flag(False),
    "attn_use_rope": flag(False),
    "dim_model_base": size(),
    "head_dim": size(None),
    "hidden_act": only("silu"),
    "hidden_size": size(4096),
    "initializer_range": unit_interval(0.1),
    "intermediate_size": size(),
    "lightning_head_dim": size(),
    "lightning_nh": size(),
    "lightning_nkv": size(),
    "lightning_scale": choice("1/sqrt(d)", *_SCALES),
    "lightning_use_rope": flag(True),
    "max_position_embeddings": size(32768),
    "mixer_types": Field(
        f"a list of {', '.join(_SPARSE + _LIGHTNING)}",
        lambda x: isinstance(x, list) and all(isinstance(k, str) and k in _SPARSE + _LIGHTNING for k in x),
    ),
    "num_attention_heads": size(),
    "num_hidden_layers": depth(32),
    "num_key_value_heads": size(None),
    "qk_norm": flag(True),
    "rms_norm_eps": unit_interval(1e-6),
    **ROPE_FIELDS,
    "scale_depth": positive(1.0),
    "scale_emb": positive(1.0),
    "sparse_config": mapping(),
    "tie_word_embeddings": flag(False),
    "use_output_gate": flag(False),
    "use_output_norm": flag(False),
    "vocab_size": size(),
    # Without effect on outputs.
    "mup_denominator": size(None), "pretraining_tp": size(1), "rope_percent": only(1, None),
    "shift_labels": ignored("true or false", bool),
}  # fmt: skip


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    value = read(NAME, source, _FIELDS)
    _check(value)
    L, norm_eps, width = value["num_hidden_layers"], value["rms_norm_eps"], value["hidden_size"]
    feed_forward = FeedForwardConfig(value["intermediate_size"], gated=True, activation="swish")
    mixers = {True: _attention(value), False: _lightning(value)}
    block: dict[str, Any] = {
        "norm": "rms",
        "norm_eps": norm_eps,
        "residual_scale": value["scale_depth"] / math.sqrt(L),
    }
    layers = [BlockConfig(mixers[kind in _SPARSE], feed_forward, **block) for kind in value["mixer_types"]]
    scales = {"embedding_scale": value["scale_emb"], "logit_scale": value["dim_model_base"] / width}
    return rms_model(NAME, source, value, layers, norm_eps, {"bos_token_id": 1, "eos_token_id": 2}, **scales)


def _attention(value: Mapping[str, Any]) -> AttentionConfig:
    heads = value["num_attention_heads"]
    positions: dict[str, Any] = {"rotary": "half", **_rope(value)} if value["attn_use_rope"] else {"rotary": "none"}
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=value["num_key_value_heads"] or heads,
        head_dim=head_width(value),
        gate="sigmoid" if value["attn_use_output_gate"] else "none",
        max_context=_dense_tokens(value),
        dropout=value["attention_dropout"],
        **positions,
    )


def _lightning(value: Mapping[str, Any]) -> RetentionConfig:
    """Our q is scaled by d^(-1/2). Under the norm of the output another scale is another eps."""
    heads, head_dim, normed = value["lightning_nh"], value["lightning_head_dim"], value["use_output_norm"]
    ours_by_theirs = head_dim ** (_SCALES[value["lightning_scale"]] - 0.5)
    rope = _rope(value) if value["lightning_use_rope"] else {}
    return RetentionConfig(
        num_heads=heads,
        num_kv_heads=None if value["lightning_nkv"] == heads else value["lightning_nkv"],
        key_dim=heads * head_dim,
        value_dim=heads * head_dim,
        decay="alibi",
        rotary="half" if value["lightning_use_rope"] else "none",
        qk_norm="rms" if value["qk_norm"] else "none",
        qk_norm_eps=value["rms_norm_eps"],
        gate="sigmoid" if value["use_output_gate"] else "none",
        head_norm="rms" if normed else "none",
        head_norm_affine="per_head" if normed else "none",
        head_norm_eps=value["rms_norm_eps"] * ours_by_theirs**2,
        head_norm_groups=1 if normed else None,
        **rope,
    )


def _dense_tokens(value: Mapping[str, Any]) -> int | None:
    """Tokens up to which their sparse attention is dense: below dense_len. None: without a sparse form."""
    sparse = value["sparse_config"]
    return None if sparse is None else sparse["dense_len"] - 1


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    rope = rope_options(NAME, value)
    if "rotary_scaling" in rope:
        refuse(NAME, ["rope_scaling has type 'yarn' or 'llama3'; accepted: none, 'default' or 'linear'"])
    return rope


def _check(value: Mapping[str, Any]) -> None:
    heads, kinds, sparse = value["num_attention_heads"], value["mixer_types"], value["sparse_config"]
    problems = head_problems(value)
    if len(kinds) != value["num_hidden_layers"]:
        problems.append(f"mixer_types has {len(kinds)} entries; accepted: {value['num_hidden_layers']}")
    if sparse is not None and not is_integer(sparse.get("dense_len"), 2):
        given = quoted(sparse.get("dense_len"))
        problems.append(f"sparse_config.dense_len is {given}; accepted: the tokens from which attention is sparse")
    if value["lightning_nh"] != heads:
        problems.append(
            f"lightning_nh is {value['lightning_nh']}, which gives the slopes two meanings; accepted: "
            f"num_attention_heads {heads}"
        )
    if value["lightning_nh"] % value["lightning_nkv"]:
        problems.append(f"lightning_nkv is {value['lightning_nkv']}; accepted: a divisor of {value['lightning_nh']}")
    if value["lightning_scale"] != "1/sqrt(d)" and not value["use_output_norm"]:
        given = quoted(value["lightning_scale"])
        problems.append(f"lightning_scale is {given} without use_output_norm; accepted: '1/sqrt(d)'")
    refuse(NAME, problems)


NAMES: Table = {
    "embedding.weight": EMBEDDING,
    "layers.{}.mixer_norm.weight": "model.layers.{}.input_layernorm.weight",
    **{f"layers.{{}}.mixer.{name}_proj.weight": f"{_MIXER}.{name}_proj.weight" for name in "qkv"},
    "layers.{}.mixer.q_norm_weight": f"{_MIXER}.q_norm.weight",
    "layers.{}.mixer.k_norm_weight": f"{_MIXER}.k_norm.weight",
    "layers.{}.mixer.gate_proj.weight": (f"{_MIXER}.z_proj.weight", f"{_MIXER}.o_gate.weight"),
    "layers.{}.mixer.head_norm_weight": Part(f"{_MIXER}.o_norm.weight", flat=True),
    "layers.{}.mixer.out_proj.weight": f"{_MIXER}.o_proj.weight",
    "layers.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    **{f"layers.{{}}.feed_forward.{x}_proj.weight": f"{_FED}.{x}_proj.weight" for x in ("gate", "up", "down")},
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

FORMAT = Format(
    name=NAME,
    names=lambda config: NAMES,
    config_of=config_of,
    marker="model.layers.0.self_attn.z_proj.weight",
    embedding=EMBEDDING,
    model_types=(NAME,),
)
