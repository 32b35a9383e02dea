"""flash-linear-attention's `RetNetForCausalLM`, read and written as directories of the hub (fla-hub, m-a-p).

Its rotary embedding has the "half" convention, its head norm is RMS with one weight shared by the heads, and it has no
decay normalisation. Some of its layers may be softmax attention (`attn`). Early versions stored the gate and up
projections of the feed-forward as one tensor. `use_short_conv` has no effect, because FLA's block does not pass it on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.table import Format, Part, Table, refuse, token_ids, unsupported, warn_unknown
from retnet.ops.retention import Mode

_FUSED_NORM = "model.layers.{}.attn.g_norm_swish_gate.weight"
_PLAIN_NORM = "model.layers.{}.attn.g_norm.weight"
_GATE, _UP = "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"
NAMES: Table = {
    "embedding.weight": "model.embeddings.weight",
    "layers.{}.mixer_norm.weight": "model.layers.{}.attn_norm.weight",
    "layers.{}.mixer.q_proj.weight": "model.layers.{}.attn.q_proj.weight",
    "layers.{}.mixer.k_proj.weight": "model.layers.{}.attn.k_proj.weight",
    "layers.{}.mixer.v_proj.weight": "model.layers.{}.attn.v_proj.weight",
    "layers.{}.mixer.q_proj.bias": "model.layers.{}.attn.q_proj.bias",
    "layers.{}.mixer.k_proj.bias": "model.layers.{}.attn.k_proj.bias",
    "layers.{}.mixer.v_proj.bias": "model.layers.{}.attn.v_proj.bias",
    "layers.{}.mixer.gate_proj.weight": "model.layers.{}.attn.g_proj.weight",
    "layers.{}.mixer.head_norm_weight": (_FUSED_NORM, _PLAIN_NORM),
    "layers.{}.mixer.out_proj.weight": "model.layers.{}.attn.o_proj.weight",
    "layers.{}.feed_forward_norm.weight": "model.layers.{}.mlp_norm.weight",
    "layers.{}.feed_forward.gate_proj.weight": (_GATE, Part(_GATE, 0, 2)),
    "layers.{}.feed_forward.up_proj.weight": (_UP, Part(_GATE, 1, 2)),
    "layers.{}.feed_forward.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

_DEFAULTS = {
    "attn_mode": "chunk",
    "hidden_size": 2048,
    "expand_k": 1.0,
    "expand_v": 2.0,
    "hidden_ratio": 4,  # if null; 2 if the key is missing
    "num_hidden_layers": 24,
    "num_heads": 8,
    "hidden_act": "swish",
    "use_output_gate": True,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
}
_MODES: dict[str, Mode] = {
    "chunk": "auto",
    "fused_chunk": "auto",
    "parallel": "parallel",
    "fused_recurrent": "recurrent",
}
_KNOWN = frozenset(
    [*_DEFAULTS, "attn", "bos_token_id", "eos_token_id", "feature_map", "intermediate_size", "num_kv_heads",
     "pad_token_id", "tie_word_embeddings", "vocab_size",
     # without effect on outputs: training, kernels, and a convolution that its block does not build
     "conv_size", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu",
     "max_position_embeddings", "share_conv_kernel", "use_l2warp", "use_short_conv"]
)  # fmt: skip
MAX_HEAD_KEY_DIM = 256
_CANNOT = "FLA's RetNet cannot express this model"


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    accepted = {"model_type": "retnet", "feature_map": None, "hidden_act": "swish", "attnres_block_size": None}
    problems = unsupported(source, accepted)
    if _value(source, "attn_mode") not in _MODES:
        problems.append(f"attn_mode is {source['attn_mode']!r}; accepted: {', '.join(_MODES)}")
    refuse("fla", problems)
    warn_unknown("fla", source, _KNOWN)
    width, heads, eps = (_value(source, key) for key in ("hidden_size", "num_heads", "norm_eps"))
    retention = RetentionConfig(
        num_heads=heads,
        num_kv_heads=source.get("num_kv_heads"),
        key_dim=round(width * _value(source, "expand_k")),
        value_dim=round(width * _value(source, "expand_v")),
        rotary="half",
        gate="swish" if _value(source, "use_output_gate") else "none",
        head_norm="rms",
        head_norm_affine="shared" if _value(source, "elementwise_affine") else "none",
        head_norm_eps=eps,
        mode=_MODES[_value(source, "attn_mode")],
    )
    feed_forward = FeedForwardConfig(_intermediate_size(source, width), gated=True, activation="swish")
    attention = _attention(source.get("attn"), width)
    layers = (
        BlockConfig(attention.get(i, retention), feed_forward, norm="rms", norm_eps=eps)
        for i in range(_value(source, "num_hidden_layers"))
    )
    return ModelConfig(
        vocab_size=source["vocab_size"],
        d_model=width,
        layers=tuple(layers),
        name="fla",
        tie_embeddings=source.get("tie_word_embeddings", False),
        final_norm="rms",
        norm_eps=eps,
        init="normal",
        init_std=_value(source, "initializer_range"),
        **token_ids({"bos_token_id": 1, "eos_token_id": 2} | dict(source)),
    )


def _value(source: Mapping[str, Any], key: str) -> Any:
    value = source.get(key)
    return _DEFAULTS[key] if value is None else value


def _intermediate_size(source: Mapping[str, Any], width: int) -> int:
    """The given size, or two thirds of width * hidden_ratio, rounded up to a multiple of 256."""
    if source.get("intermediate_size") is not None:
        return source["intermediate_size"]
    ratio = _value(source, "hidden_ratio") if "hidden_ratio" in source else 2
    return 256 * -(-int(width * ratio * 2 / 3) // 256)


def _attention(attn: Mapping[str, Any] | None, width: int) -> dict[int, AttentionConfig]:
    """The layers that are softmax attention."""
    if attn is None:
        return {}
    known = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")
    problems = [
        f"attn.{key} is {attn[key]!r}; accepted: {', '.join(known)}" for key in attn if key not in known and attn[key]
    ]
    refuse("fla", problems + [f"attn has no {key}" for key in known[:2] if key not in attn])
    mixer = AttentionConfig(
        num_heads=attn["num_heads"],
        num_kv_heads=attn.get("num_kv_heads") or attn["num_heads"],
        head_dim=width // attn["num_heads"],
        rotary="half",
        rotary_base=attn.get("rope_theta") or 10000.0,
        window=attn.get("window_size"),
        qkv_bias=attn.get("qkv_bias", False),
    )
    return dict.fromkeys(attn["layers"], mixer)


# Fields that change no output, so FLA's format need not express them.
_FREE: dict[type, set[str]] = {
    ModelConfig: {"dtype", "gradient_checkpointing", "init", "layers", "name", "seed"},
    BlockConfig: {"feed_forward", "mixer"},
    RetentionConfig: {"chunk_size", "mode"},
    AttentionConfig: set(),
    FeedForwardConfig: {"inner_norm_eps"},
}


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Our configuration as their config.json.

    Raises ValueError that names every feature that FLA cannot express: those that reading the result would change.
    """
    retention = next((x.mixer for x in config.layers if isinstance(x.mixer, RetentionConfig)), None)
    feed_forward = next((x.feed_forward for x in config.layers if x.feed_forward is not None), None)
    if retention is None or feed_forward is None:
        raise ValueError(f"{_CANNOT}: it has no {'feed_forward' if retention else 'retention layer'}")
    data = {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "attn": _attn(config),
        "attn_mode": {"parallel": "parallel", "recurrent": "fused_recurrent"}.get(retention.mode, "chunk"),
        "bos_token_id": config.bos_token_id,
        "dtype": config.dtype,
        "elementwise_affine": retention.head_norm_affine != "none",
        "eos_token_id": config.eos_token_id,
        "expand_k": retention.key_dim / config.d_model,
        "expand_v": retention.value_dim / config.d_model,
        "hidden_act": "swish",
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": feed_forward.hidden_dim,
        "norm_eps": config.norm_eps,
        "num_heads": retention.num_heads,
        "num_hidden_layers": len(config.layers),
        "num_kv_heads": retention.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.tie_embeddings,
        "use_output_gate": retention.gate == "swish",
        "vocab_size": config.vocab_size,
    }
    refuse(_CANNOT, _lost(config, config_of(data)))
    return data


def _attn(config: ModelConfig) -> dict[str, Any] | None:
    attention = {i: x.mixer for i, x in enumerate(config.layers) if isinstance(x.mixer, AttentionConfig)}
    if not attention:
        return None
    mixer = next(iter(attention.values()))
    return {
        "layers": list(attention),
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        "qkv_bias": mixer.qkv_bias,
        "window_size": mixer.window,
        "rope_theta": mixer.rotary_base,
    }


def _lost(config: ModelConfig, said: ModelConfig) -> list[str]:
    """The differences of `said` from `config`. One that several layers share is listed once."""
    layers: dict[str, list[int]] = {}
    for i, (ours, theirs) in enumerate(zip(config.layers, said.layers)):
        problems = _differences(ours, theirs, "") + _differences(ours.mixer, theirs.mixer, "mixer.")
        problems += _differences(ours.feed_forward, theirs.feed_forward, "feed_forward.")
        if isinstance(ours.mixer, RetentionConfig) and ours.mixer.head_key_dim > MAX_HEAD_KEY_DIM:
            problems.append(
                f"mixer.key_dim gives heads of {ours.mixer.head_key_dim} (there: at most {MAX_HEAD_KEY_DIM})"
            )
        for problem in problems:
            layers.setdefault(problem, []).append(i)
    return _differences(config, said, "") + [
        f"{problem} in {len(where)} layers, the first being {where[0]}" for problem, where in layers.items()
    ]


def _differences(ours: Any, theirs: Any, path: str) -> list[str]:
    """The fields of one dataclass that differ."""
    if type(ours) is not type(theirs):
        return [f"{path[:-1]} is {getattr(ours, 'kind', None)!r} (there: {theirs.kind!r})"]
    names = [f.name for f in fields(ours) if f.name not in _FREE[type(ours)]]
    return [
        f"{path}{name} is {getattr(ours, name)!r} (there: {getattr(theirs, name)!r})"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]


def names(config: ModelConfig) -> Table:
    """The table. Without an output gate, the head norm has only one name."""
    gated = any(isinstance(x.mixer, RetentionConfig) and x.mixer.gate == "swish" for x in config.layers)
    return NAMES if gated else {**NAMES, "layers.{}.mixer.head_norm_weight": _PLAIN_NORM}


FORMAT = Format(
    name="fla",
    names=names,
    config_of=config_of,
    marker="model.layers.0.attn_norm.weight",
    embedding="model.embeddings.weight",
    config_to=config_to,
)
