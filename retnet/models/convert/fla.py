"""flash-linear-attention's `RetNetForCausalLM` and `TransformerForCausalLM`, read and written as hub directories.

RetNet's rotary embedding has the "half" convention, its head norm is RMS with one weight shared by the heads, and it
has no decay normalisation. Some of its layers may be softmax attention (`attn`). Early versions stored the gate and up
projections of the feed-forward as one tensor. In a Transformer of theirs all layers are such attention, in the same
blocks. Their Mamba is read with transformers' (`mamba.py`), single layers by `fla_layers.py`.

`use_short_conv` has an effect only with the convolutions' tensors: FLA's block does not pass it on to its layer, but
models with a block that does have them. Such models are read, and not written, as FLA would not build them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mixer_base import MixerConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.config_json import token_fields
from retnet.models.convert.fields import (
    Field,
    choice,
    depth,
    flag,
    only,
    positive,
    read,
    refuse,
    size,
    times,
    unit_interval,
)  # fmt: skip
from retnet.models.convert.rms_model import rms_model
from retnet.models.convert.table import Format, Joined, Part, Table
from retnet.models.tensor_files import Tensors
from retnet.ops.retention import Mode
from retnet.system.checks import is_integer, quoted

_FUSED_NORM = "model.layers.{}.attn.g_norm_swish_gate.weight"
_PLAIN_NORM = "model.layers.{}.attn.g_norm.weight"
_GATE, _UP = "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"
_CONVOLUTIONS = "model.layers.{}.attn.[qkv]_conv1d.weight"
NAMES: Table = {
    "embedding.weight": "model.embeddings.weight",
    "layers.{}.mixer_norm.weight": "model.layers.{}.attn_norm.weight",
    "layers.{}.mixer.q_proj.weight": "model.layers.{}.attn.q_proj.weight",
    "layers.{}.mixer.k_proj.weight": "model.layers.{}.attn.k_proj.weight",
    "layers.{}.mixer.v_proj.weight": "model.layers.{}.attn.v_proj.weight",
    "layers.{}.mixer.q_proj.bias": "model.layers.{}.attn.q_proj.bias",
    "layers.{}.mixer.k_proj.bias": "model.layers.{}.attn.k_proj.bias",
    "layers.{}.mixer.v_proj.bias": "model.layers.{}.attn.v_proj.bias",
    "layers.{}.mixer.q_norm_weight": "model.layers.{}.attn.q_norm.weight",
    "layers.{}.mixer.k_norm_weight": "model.layers.{}.attn.k_norm.weight",
    "layers.{}.mixer.gate_proj.weight": "model.layers.{}.attn.g_proj.weight",
    "layers.{}.mixer.conv.weight": _CONVOLUTIONS,
    "layers.{}.mixer.head_norm_weight": (_FUSED_NORM, _PLAIN_NORM),
    "layers.{}.mixer.out_proj.weight": "model.layers.{}.attn.o_proj.weight",
    "layers.{}.feed_forward_norm.weight": "model.layers.{}.mlp_norm.weight",
    "layers.{}.feed_forward.gate_proj.weight": (_GATE, Part(_GATE, 0, 2)),
    "layers.{}.feed_forward.up_proj.weight": (_UP, Part(_GATE, 1, 2)),
    "layers.{}.feed_forward.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

_MODES: dict[str, Mode] = {
    "chunk": "auto",
    "fused_chunk": "auto",
    "parallel": "parallel",
    "fused_recurrent": "recurrent",
}
_BLOCKS = {
    "attnres_block_size": only(None),
    "hidden_act": only("swish"),
    "hidden_size": size(2048),
    "initializer_range": unit_interval(0.02),
    "intermediate_size": size(None),
    "norm_eps": unit_interval(1e-6),
    "num_hidden_layers": depth(24),
    "num_kv_heads": size(None),
    "tie_word_embeddings": flag(False),
    "vocab_size": size(),
    # without effect on outputs: training and kernels
    "fuse_cross_entropy": flag(False), "fuse_linear_cross_entropy": flag(False), "fuse_norm": flag(False),
    "fuse_swiglu": flag(False), "max_position_embeddings": size(None), "use_l2warp": flag(False),
}  # fmt: skip
_FIELDS = {
    **_BLOCKS,
    "attn": Field("an object, a list of objects, or null", lambda x: _is_attention(x), None),
    "attn_mode": choice("chunk", *_MODES),
    "conv_size": size(4),
    "elementwise_affine": flag(True),
    "expand_k": times(1.0),
    "expand_v": times(2.0),
    "feature_map": only(None),
    "hidden_ratio": times(2, null=4),
    "num_heads": size(8),
    "share_conv_kernel": flag(False),  # without effect on outputs
    "use_output_gate": flag(True),
    "use_short_conv": flag(False),
}
_TRANSFORMER = {
    **_BLOCKS,
    "elementwise_affine": flag(True),  # without effect: their blocks do not pass it on
    "hidden_ratio": times(4, null=4),
    "num_heads": size(32),
    "qk_norm": flag(False),
    "qkv_bias": flag(False),
    "rope_theta": positive(10000.0),
    "window_size": size(None),
}
_ATTENTION = {
    "layers": Field(
        "a list of layer numbers", lambda x: isinstance(x, list) and all(is_integer(i, -math.inf) for i in x)
    ),
    "num_heads": size(),
    "num_kv_heads": size(None),
    "qkv_bias": flag(False),
    "rope_theta": positive(10000.0),
    "window_size": size(None),
}
QK_NORM_EPS = 1e-5  # of the norms of q and k, which no key of theirs sets
MAX_HEAD_KEY_DIM = 256
_CANNOT = "FLA's RetNet cannot express this model"


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    if choice("retnet", "retnet", "transformer").read(source, "model_type") == "transformer":
        return transformer_config_of(source)
    value = read("fla", source, _FIELDS)
    width, heads, norm_eps = value["hidden_size"], value["num_heads"], value["norm_eps"]
    conv_width = value["conv_size"] if value["use_short_conv"] else None
    if conv_width is not None and not 2 <= conv_width <= 8:
        refuse("fla", [f"conv_size is {conv_width} with use_short_conv; accepted: 2 to 8"])
    retention = RetentionConfig(
        num_heads=heads,
        num_kv_heads=value["num_kv_heads"],
        key_dim=round(width * value["expand_k"]),
        value_dim=round(width * value["expand_v"]),
        rotary="half",
        conv_width=conv_width,
        gate="swish" if value["use_output_gate"] else "none",
        head_norm="rms",
        head_norm_affine="shared" if value["elementwise_affine"] else "none",
        head_norm_eps=norm_eps,
        mode=_MODES[value["attn_mode"]],
    )
    num_layers, attention = value["num_hidden_layers"], {}
    for attn in _specifications(value["attn"]):
        found = _attention(attn, width, num_layers)
        again = [f"attn has layer {i} twice; accepted: once" for i in found if i in attention]
        refuse("fla", again)
        attention |= found
    return _model(source, value, [attention.get(i, retention) for i in range(num_layers)])


def attention_of(value: Mapping[str, Any], name: str) -> AttentionConfig:
    """The attention layer that their fields describe. name: whose fields they are, for errors."""
    width, heads = value["hidden_size"], value["num_heads"]
    if width % heads:
        refuse(name, [f"num_heads is {heads}; accepted: a divisor of hidden_size {width}"])
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=value["num_kv_heads"] or heads,
        head_dim=width // heads,
        rotary="half",
        rotary_base=value["rope_theta"],
        qk_norm="rms" if value["qk_norm"] else "none",
        qk_norm_eps=QK_NORM_EPS,
        window=value["window_size"],
        qkv_bias=value["qkv_bias"],
    )


def transformer_config_of(source: Mapping[str, Any]) -> ModelConfig:
    """The config.json of a Transformer of theirs as our configuration."""
    value = read("fla", source, _TRANSFORMER)
    mixer = attention_of(value, "fla")
    return _model(source, value, [mixer] * value["num_hidden_layers"])


def _model(source: Mapping[str, Any], value: Mapping[str, Any], mixers: Sequence[MixerConfig]) -> ModelConfig:
    """Their blocks around the mixers."""
    width, norm_eps = value["hidden_size"], value["norm_eps"]
    hidden = value["intermediate_size"] or _intermediate_size(width, value["hidden_ratio"])
    feed_forward = FeedForwardConfig(hidden, gated=True, activation="swish")
    layers = (BlockConfig(mixer, feed_forward, norm="rms", norm_eps=norm_eps) for mixer in mixers)
    return rms_model("fla", source, value, tuple(layers), norm_eps, {"bos_token_id": 1, "eos_token_id": 2})


def _intermediate_size(width: int, ratio: float) -> int:
    """Two thirds of width * ratio, rounded up to a multiple of 256."""
    return 256 * -(-int(width * ratio * 2 / 3) // 256)


def _is_attention(x: Any) -> bool:
    return isinstance(x, Mapping) or (isinstance(x, list) and all(isinstance(spec, Mapping) for spec in x))


def _specifications(attn: Any) -> list[Mapping[str, Any]]:
    """The specifications of attention layers; each gives some layers their options."""
    return [] if attn is None else [attn] if isinstance(attn, Mapping) else attn


def _attention(attn: Mapping[str, Any], width: int, num_layers: int) -> dict[int, AttentionConfig]:
    """The layers that are softmax attention."""
    unknown = [f"attn.{key} is {quoted(attn[key])}" for key in attn if key not in _ATTENTION and attn[key]]
    refuse("fla", [f"{problem}; accepted: {', '.join(_ATTENTION)}" for problem in unknown])
    value = read("fla: attn", attn, _ATTENTION)
    heads, layers = value["num_heads"], value["layers"]
    problems = [f"attn.layers has {i}; accepted: 0 to {num_layers - 1}" for i in layers if not 0 <= i < num_layers]
    if width % heads:
        problems.append(f"attn.num_heads is {heads}; accepted: a divisor of hidden_size {width}")
    refuse("fla", problems)
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=value["num_kv_heads"] or heads,
        head_dim=width // heads,
        rotary="half",
        rotary_base=value["rope_theta"],
        qk_norm_eps=QK_NORM_EPS,
        window=value["window_size"],
        qkv_bias=value["qkv_bias"],
    )
    return dict.fromkeys(layers, mixer)


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
    attention = next((x.mixer for x in config.layers if isinstance(x.mixer, AttentionConfig)), None)
    feed_forward = next((x.feed_forward for x in config.layers if x.feed_forward is not None), None)
    if (retention is None and attention is None) or feed_forward is None:
        missing = "retention or attention layer" if feed_forward else "feed_forward"
        missing = "retention or attention layer" if feed_forward else "feed_forward"
        raise ValueError(f"{_CANNOT}: it has no {missing}")
    data = {
        "hidden_act": "swish",
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": feed_forward.hidden_dim,
        "norm_eps": config.norm_eps,
        "num_hidden_layers": len(config.layers),
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        "dtype": config.dtype,
        **token_fields(config),
    }
    if retention is not None:
        data |= _retnet_data(config, retention)
    elif attention is not None:
        data |= _transformer_data(attention)
    refuse(_CANNOT, _lost(config, config_of(data)))
    return data


def _retnet_data(config: ModelConfig, retention: RetentionConfig) -> dict[str, Any]:
    return {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "attn": _attn(config),
        "attn_mode": {"parallel": "parallel", "recurrent": "fused_recurrent"}.get(retention.mode, "chunk"),
        "elementwise_affine": retention.head_norm_affine != "none",
        "expand_k": retention.key_dim / config.d_model,
        "expand_v": retention.value_dim / config.d_model,
        "num_heads": retention.num_heads,
        "num_kv_heads": retention.num_kv_heads,
        "use_output_gate": retention.gate == "swish",
    }


def _transformer_data(attention: AttentionConfig) -> dict[str, Any]:
    return {
        "architectures": ["TransformerForCausalLM"],
        "model_type": "transformer",
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "qk_norm": attention.qk_norm == "rms",
        "qkv_bias": attention.qkv_bias,
        "rope_theta": attention.rotary_base,
        "window_size": attention.window,
    }


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
    """The fields of one dataclass that differ, and change its outputs."""
    if type(ours) is not type(theirs):
        return [f"{path[:-1]} is {getattr(ours, 'kind', None)!r} (there: {theirs.kind!r})"]
    free = _FREE[type(ours)] | ({"qk_norm_eps"} if getattr(ours, "qk_norm", None) == "none" else set())
    names = [f.name for f in fields(ours) if f.compare and f.name not in free]
    return [
        f"{path}{name} is {getattr(ours, name)!r} (there: {getattr(theirs, name)!r})"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]


def names(config: ModelConfig) -> Table:
    """The table. Without an output gate, the head norm has only one name."""
    gated = any(isinstance(x.mixer, RetentionConfig) and x.mixer.gate == "swish" for x in config.layers)
    return NAMES if gated else {**NAMES, "layers.{}.mixer.head_norm_weight": _PLAIN_NORM}


def joined(config: ModelConfig) -> Joined:
    """The convolutions of q, k and v."""
    mixer = next((x.mixer for x in config.layers if isinstance(x.mixer, RetentionConfig)), None)
    if mixer is None or mixer.conv_width is None:
        return {}
    return {_CONVOLUTIONS: {_CONVOLUTIONS.replace("[qkv]", part): mixer.projected[part] for part in mixer.conv_on}}


def effective(config: ModelConfig, tensors: Tensors) -> ModelConfig:
    """The configuration, without convolutions if there are no tensors of any."""
    if not _lacks_convolutions(config, tensors):
        return config
    warnings.warn("fla: use_short_conv has no effect: the weights include no convolution", stacklevel=4)
    layers = tuple(
        replace(x, mixer=replace(x.mixer, conv_width=None)) if isinstance(x.mixer, RetentionConfig) else x
        for x in config.layers
    )
    return replace(config, layers=layers)


def settle(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, set[str]]:
    """The configuration. Raises ValueError if it has convolutions and the weights have none."""
    if _lacks_convolutions(config, tensors):
        width = next(x.mixer.conv_width for x in config.layers if isinstance(x.mixer, RetentionConfig))
        raise ValueError(
            f"conv_width is {width}, but the weights, read as fla, include no convolution (tensors *_conv1d.weight); "
            "accepted for these weights: conv_width None"
        )
    return config, set()


def _lacks_convolutions(config: ModelConfig, tensors: Tensors) -> bool:
    return bool(joined(config)) and not any(name.endswith("_conv1d.weight") for name in tensors.specs)


FORMAT = Format(
    name="fla",
    names=names,
    config_of=config_of,
    marker="model.layers.0.attn_norm.weight",
    embedding="model.embeddings.weight",
    joined=joined,
    effective=effective,
    model_types=("transformer",),
    settle=settle,
    config_to=config_to,
)
