"""transformers' Llama, Mistral, Qwen2 and Qwen3: grouped-query attention, half rotary positions, SwiGLU, RMS pre-norms.

The four share their tensors' names. Mistral has a sliding window. Qwen2 has biases of q, k and v, Qwen3 RMS norms over
each head of q and k, and both may have a window in some layers. Of the ways to extend a trained context, those that are
fixed when the model is built are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import (
    Field,
    choice,
    depth,
    flag,
    head_problems,
    head_width,
    only,
    rate,
    read,
    refuse,
    size,
    unit_interval,
)  # fmt: skip
from retnet.models.convert.rms_model import rms_model
from retnet.models.convert.rope import ROPE_FIELDS, rope_options
from retnet.models.convert.table import Format, Table
from retnet.models.tensor_files import Tensors
from retnet.system.checks import quoted

EMBEDDING = "model.embed_tokens.weight"
NAMES: Table = {
    "embedding.weight": EMBEDDING,
    "layers.{}.mixer_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.mixer.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.mixer.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.mixer.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.mixer.out_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mixer.q_norm_weight": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.mixer.k_norm_weight": "model.layers.{}.self_attn.k_norm.weight",
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

_WINDOWS = ("full_attention", "sliding_attention")
_SHARED = {
    "attention_dropout": rate(0.0),
    "head_dim": size(None),
    "hidden_act": only("silu", "swish"),
    "hidden_size": size(4096),
    "initializer_range": unit_interval(0.02),
    "intermediate_size": size(11008),
    "layer_types": Field(
        f"a list of {' and '.join(_WINDOWS)}",
        lambda x: isinstance(x, list) and all(isinstance(kind, str) and kind in _WINDOWS for kind in x),
        None,
    ),
    **ROPE_FIELDS,
    "max_position_embeddings": size(2048),
    "num_attention_heads": size(32),
    "num_hidden_layers": depth(32),
    "num_key_value_heads": size(None),
    "partial_rotary_factor": only(1, None),
    "pretraining_tp": size(1),
    "rms_norm_eps": unit_interval(1e-6),
    "tie_word_embeddings": flag(False),
    "vocab_size": size(),
}
_QWEN = {
    **_SHARED,
    "intermediate_size": size(22016),
    "max_position_embeddings": size(32768),
    "max_window_layers": size(28, least=0),
    "num_key_value_heads": size(32, null=None),
    "sliding_window": size(4096, null=None),
    "use_sliding_window": flag(False),
}
# The fields of each model_type.
_FIELDS: dict[str, dict[str, Field]] = {
    "llama": {**_SHARED, "attention_bias": flag(False), "mlp_bias": flag(False)},
    "mistral": {
        **_SHARED,
        "intermediate_size": size(14336),
        "max_position_embeddings": size(131072),
        "num_key_value_heads": size(8, null=None),
        "sliding_window": size(4096, null=None),
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "attention_bias": flag(False), "head_dim": size(128)},
}
_TOKENS = {"llama": (1, 2), "mistral": (1, 2), "qwen2": (None, None), "qwen3": (None, None)}  # bos and eos by default


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    family = choice("llama", *_FIELDS).read(source, "model_type")
    value = read(family, source, _FIELDS[family])
    heads, norm_eps = value["num_attention_heads"], value["rms_norm_eps"]
    refuse(family, head_problems(value))
    biases = value.get("attention_bias", False)
    attention = {
        "num_heads": heads,
        "num_kv_heads": value["num_key_value_heads"] or heads,
        "head_dim": head_width(value),
        "rotary": "half",
        "qk_norm": "rms" if family == "qwen3" else "none",
        "qk_norm_eps": norm_eps,
        "qkv_bias": biases or family == "qwen2",
        "out_bias": biases,
        "dropout": value["attention_dropout"],
        **rope_options(family, value),
    }
    feed_forward = FeedForwardConfig(
        value["intermediate_size"], gated=True, activation="swish", bias=value.get("mlp_bias", False)
    )
    windows = _windows(family, value)
    layers = {
        window: BlockConfig(AttentionConfig(**attention, window=window), feed_forward, norm="rms", norm_eps=norm_eps)
        for window in set(windows)
    }
    bos, eos = _TOKENS[family]
    layers_in_order, tokens = [layers[window] for window in windows], {"bos_token_id": bos, "eos_token_id": eos}
    return rms_model(family, source, value, layers_in_order, norm_eps, tokens)


def _windows(family: str, value: Mapping[str, Any]) -> list[int | None]:
    """The tokens that each layer sees; None: all."""
    num_layers, window = value["num_hidden_layers"], value.get("sliding_window")
    kinds = value["layer_types"]
    if "use_sliding_window" not in value:
        kind = "full_attention" if window is None else "sliding_attention"
        if kinds and set(kinds) != {kind}:
            refuse(family, [f"layer_types is {quoted(kinds)}; accepted: {kind!r} for all, as its layers are alike"])
        return [window] * num_layers
    if not value["use_sliding_window"]:
        window = None
    if kinds is None:
        first = value["max_window_layers"]
        return [window if i >= first else None for i in range(num_layers)]
    if len(kinds) != num_layers:
        refuse(family, [f"layer_types has {len(kinds)} entries; accepted: num_hidden_layers {num_layers}"])
    if window is None and "sliding_attention" in kinds:
        refuse(family, ["layer_types has sliding_attention without a window; accepted: use_sliding_window true"])
    return [window if kind == "sliding_attention" else None for kind in kinds]


def settle(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, set[str]]:
    """The configuration, and the rotary frequencies that early checkpoints store, which follow from it."""
    return config, {name for name in tensors.specs if name.endswith(".self_attn.rotary_emb.inv_freq")}


FORMAT = Format(
    name="llama",
    names=lambda config: NAMES,
    config_of=config_of,
    marker="model.layers.0.self_attn.q_proj.weight",
    embedding=EMBEDDING,
    settle=settle,
)
