"""transformers' `LlamaForCausalLM`: grouped-query attention, half rotary positions, SwiGLU, RMS pre-norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.table import Format, Table, refuse, token_ids, unsupported, warn_unknown

EMBEDDING = "model.embed_tokens.weight"
NAMES: Table = {
    "embedding.weight": EMBEDDING,
    "layers.{}.mixer_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.mixer.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.mixer.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.mixer.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.mixer.out_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mixer.q_proj.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.mixer.k_proj.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.{}.mixer.v_proj.bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.{}.mixer.out_proj.bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.feed_forward.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.gate_proj.bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers.{}.feed_forward.up_proj.bias": "model.layers.{}.mlp.up_proj.bias",
    "layers.{}.feed_forward.down_proj.bias": "model.layers.{}.mlp.down_proj.bias",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}
# Keys that are read below or do not change outputs. Our positions have no limit.
_FREE = {
    "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "max_position_embeddings", "num_key_value_heads",
    "pad_token_id", "pretraining_tp", "rope_parameters", "rope_scaling", "rope_theta", "vocab_size",
}  # fmt: skip


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    refuse("llama", unsupported(source, {"model_type": "llama", "hidden_act": "silu"}))
    warn_unknown("llama", source, {*_DEFAULTS, *_FREE})
    value = {key: default if source.get(key) is None else source[key] for key, default in _DEFAULTS.items()}
    width, heads, eps = value["hidden_size"], value["num_attention_heads"], value["rms_norm_eps"]
    base, factor = _rotary(source)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=source.get("num_key_value_heads") or heads,
        head_dim=source.get("head_dim") or width // heads,
        rotary="half",
        rotary_base=base,
        rotary_factor=factor,
        qkv_bias=value["attention_bias"],
        out_bias=value["attention_bias"],
        dropout=value["attention_dropout"],
    )
    feed_forward = FeedForwardConfig(value["intermediate_size"], gated=True, activation="swish", bias=value["mlp_bias"])
    layer = BlockConfig(attention, feed_forward, norm="rms", norm_eps=eps)
    return ModelConfig(
        vocab_size=source["vocab_size"],
        d_model=width,
        layers=(layer,) * value["num_hidden_layers"],
        name="llama",
        tie_embeddings=value["tie_word_embeddings"],
        final_norm="rms",
        norm_eps=eps,
        init="normal",
        init_std=value["initializer_range"],
        **token_ids({"bos_token_id": 1, "eos_token_id": 2} | dict(source)),
    )


def _rotary(source: Mapping[str, Any]) -> tuple[float, float]:
    """(base, factor), from one mapping (transformers 5) or from two keys (earlier versions)."""
    rope = {"rope_theta": source.get("rope_theta"), **(source.get("rope_scaling") or {})}
    rope |= source.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear"):
        refuse("llama", [f"rope_type is {kind!r}; accepted: default, linear"])
    return rope.get("rope_theta") or 10000.0, rope.get("factor", 1.0) if kind == "linear" else 1.0


FORMAT = Format(
    name="llama",
    names=lambda config: NAMES,
    config_of=config_of,
    marker="model.layers.0.self_attn.q_proj.weight",
    embedding=EMBEDDING,
)
