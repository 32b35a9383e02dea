"""flash-linear-attention's `RetNetForCausalLM`: directories of the hub (fla-hub, m-a-p), read and written.

Its rotary embedding is the "half" convention, its head norm is RMS with one weight shared by the heads, and it has no
decay normalisation. Some of its layers may be softmax attention (`attn`), and early versions stored the two matrices of
the feed-forward's first stage as one. It ignores `use_short_conv`, as its block never hands it on.
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
    "hidden_ratio": 4,  # of null; of a missing key it is 2
    "num_hidden_layers": 24,
    "num_heads": 8,
    "hidden_act": "swish",
    "use_output_gate": True,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
}
_MODES = {"chunk": "auto", "fused_chunk": "auto", "parallel": "parallel", "fused_recurrent": "recurrent"}
_KNOWN = frozenset(
    [*_DEFAULTS, "attn", "bos_token_id", "eos_token_id", "feature_map", "intermediate_size", "num_kv_heads",
     "pad_token_id", "tie_word_embeddings", "vocab_size",
     # of no effect on outputs: training, kernels, and a convolution that its block does not build
     "conv_size", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu",
     "max_position_embeddings", "share_conv_kernel", "use_l2warp", "use_short_conv"]
)  # fmt: skip
MAX_HEAD_KEY_DIM = 256


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
    """Given, or two thirds of width * hidden_ratio rounded up to a multiple of 256."""
    if source.get("intermediate_size") is not None:
        return source["intermediate_size"]
    ratio = _value(source, "hidden_ratio") if "hidden_ratio" in source else 2
    return 256 * -(-int(width * ratio * 2 / 3) // 256)


def _attention(attn: Mapping[str, Any] | None, width: int) -> dict[int, AttentionConfig]:
    """The layers that are softmax attention."""
    if attn is None:
        return {}
    known = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")
    problems = [f"attn.{key} is {attn[key]!r}; accepted: {', '.join(known)}" for key in attn if key not in known]
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


# What a configuration must say for FLA to have it. The fields that its config.json expresses are in _EXPRESSED, those
# that change no output in _FREE; together they are all there are.
_REQUIRED: dict[type, dict[str, tuple[Any, ...]]] = {
    ModelConfig: {
        "embedding_scale": (1.0,),
        "embedding_norm": ("none",),
        "final_norm": ("rms",),
        "logit_soft_cap": (None,),
    },
    BlockConfig: {
        "norm": ("rms",),
        "norm_position": ("pre",),
        "residual": ("sequential",),
        "residual_scale": (1.0,),
        "skip_scale": (1.0,),
        "dropout": (0.0,),
    },
    RetentionConfig: {
        "decay": ("paper",),
        "learnable_decay": (False,),
        "decay_norm": (False,),
        "rotary": ("half",),
        "rotary_base": (10000.0,),
        "rotary_factor": (1.0,),
        "head_norm": ("rms",),
        "head_norm_affine": ("none", "shared"),
        "bias": (False,),
    },
    AttentionConfig: {
        "rotary": ("half",),
        "rotary_factor": (1.0,),
        "alibi": (False,),
        "out_bias": (False,),
        "dropout": (0.0,),
    },
    FeedForwardConfig: {"gated": (True,), "activation": ("swish",), "bias": (False,), "inner_norm": ("none",)},
}
_EXPRESSED: dict[type, set[str]] = {
    ModelConfig: {"vocab_size", "d_model", "layers", "tie_embeddings", "norm_eps", "init_std", "dtype"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"},
    BlockConfig: {"mixer", "feed_forward", "norm_eps"},
    RetentionConfig: {"num_heads", "num_kv_heads", "key_dim", "value_dim", "gate", "head_norm_eps", "mode"},
    AttentionConfig: {"num_heads", "num_kv_heads", "head_dim", "rotary_base", "window", "qkv_bias"},
    FeedForwardConfig: {"hidden_dim"},
}
_FREE: dict[type, set[str]] = {
    ModelConfig: {"name", "init", "seed", "gradient_checkpointing"},
    BlockConfig: set(),
    RetentionConfig: {"chunk_size", "kind"},
    AttentionConfig: {"kind"},
    FeedForwardConfig: {"kind", "inner_norm_eps"},
}


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Our configuration as their config.json. Raises ValueError that names every feature it cannot express."""
    problems = _lacking(config, "")
    for i, layer in enumerate(config.layers):
        problems += _lacking(layer, f"layers[{i}].")
        problems += _lacking(layer.mixer, f"layers[{i}].mixer.")
        problems += _lacking(layer.feed_forward, f"layers[{i}].feed_forward.")
    refuse("FLA's RetNet cannot express this model", list(dict.fromkeys(problems)))
    retention = next((x.mixer for x in config.layers if isinstance(x.mixer, RetentionConfig)), None)
    if retention is None:
        raise ValueError("FLA's RetNet cannot express this model: no layer is retention")
    attention = [i for i, x in enumerate(config.layers) if isinstance(x.mixer, AttentionConfig)]
    data = {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "attn": _attn(config, attention),
        "attn_mode": {"parallel": "parallel", "recurrent": "fused_recurrent"}.get(retention.mode, "chunk"),
        "bos_token_id": config.bos_token_id,
        "dtype": config.dtype,
        "elementwise_affine": retention.head_norm_affine == "shared",
        "eos_token_id": config.eos_token_id,
        "expand_k": retention.key_dim / config.d_model,
        "expand_v": retention.value_dim / config.d_model,
        "hidden_act": "swish",
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": config.layers[0].feed_forward.hidden_dim,
        "norm_eps": config.norm_eps,
        "num_heads": retention.num_heads,
        "num_hidden_layers": len(config.layers),
        "num_kv_heads": retention.num_kv_heads,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.tie_embeddings,
        "use_output_gate": retention.gate == "swish",
        "vocab_size": config.vocab_size,
    }
    refuse("FLA's RetNet cannot express this model", _one_of_each(config, data))
    return data


def _lacking(part: Any, path: str) -> list[str]:
    """Values of one dataclass that FLA has no word for."""
    accepted = _REQUIRED.get(type(part))
    if accepted is None:
        return [f"{path[:-1]} is {type(part).__name__}"]
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    problems = [
        f"{path}{name} is {values[name]!r} (accepted: {' or '.join(map(repr, choices))})"
        for name, choices in accepted.items()
        if values[name] not in choices
    ]
    if isinstance(part, RetentionConfig) and part.head_key_dim > MAX_HEAD_KEY_DIM:
        problems.append(f"{path}key_dim gives heads of {part.head_key_dim} (accepted: at most {MAX_HEAD_KEY_DIM})")
    return problems


def _attn(config: ModelConfig, layers: list[int]) -> dict[str, Any] | None:
    if not layers:
        return None
    mixer = config.layers[layers[0]].mixer
    return {
        "layers": layers,
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        "qkv_bias": mixer.qkv_bias,
        "window_size": mixer.window,
        "rope_theta": mixer.rotary_base,
    }


def _one_of_each(config: ModelConfig, data: dict[str, Any]) -> list[str]:
    """FLA has one kind of retention, attention and feed-forward for a whole model, and one eps: do they say it all?"""
    said = config_of(data)
    problems = []
    for i, (ours, theirs) in enumerate(zip(config.layers, said.layers)):
        for name in ("mixer", "feed_forward"):
            mine, read = getattr(ours, name), getattr(theirs, name)
            expressed = sorted(_EXPRESSED[type(mine)] - {"mode"})
            problems += [
                f"layers[{i}].{name}.{field} is {getattr(mine, field)!r}, not {getattr(read, field)!r} as in the rest"
                for field in expressed
                if getattr(mine, field) != getattr(read, field)
            ]
        if ours.norm_eps != theirs.norm_eps:
            problems.append(f"layers[{i}].norm_eps is {ours.norm_eps}, not {theirs.norm_eps} as in the rest")
    return problems


def names(config: ModelConfig) -> Table:
    """The table; without an output gate the head norm has one name alone."""
    gated = any(isinstance(x.mixer, RetentionConfig) and x.mixer.gate == "swish" for x in config.layers)
    return NAMES if gated else NAMES | {"layers.{}.mixer.head_norm_weight": _PLAIN_NORM}


FORMAT = Format(
    name="fla",
    names=names,
    config_of=config_of,
    marker="model.layers.0.attn_norm.weight",
    embedding="model.embeddings.weight",
    config_to=config_to,
)
