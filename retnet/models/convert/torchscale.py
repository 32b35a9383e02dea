"""torchscale's RetNet (microsoft/torchscale), the authors' own code: state dict and arguments.

Its parallel and recurrent forms equal ours with `decay_norm`. Two things are not reproduced. The data-dependent clamp
of scores has no effect beyond eps, because the head norm undoes it. The chunkwise form restarts the normalisation in
every chunk, and so computes another function. syncdoth/RetNet repeats the architecture: `DECODER_NAMES`,
`decoder_config` and `settle` serve both.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.table import Format, Table, refuse, unsupported
from retnet.models.tensor_files import Tensors
from retnet.ops.decay import SCHEDULES
from retnet.ops.rotary import frequencies

DECODER_NAMES = {
    "embedding.weight": "embed_tokens.weight",
    "embedding_norm.weight": "layernorm_embedding.weight",
    "layers.{}.mixer_norm.weight": "layers.{}.retention_layer_norm.weight",
    "layers.{}.mixer.q_proj.weight": "layers.{}.retention.q_proj.weight",
    "layers.{}.mixer.k_proj.weight": "layers.{}.retention.k_proj.weight",
    "layers.{}.mixer.v_proj.weight": "layers.{}.retention.v_proj.weight",
    "layers.{}.mixer.gate_proj.weight": "layers.{}.retention.g_proj.weight",
    "layers.{}.mixer.out_proj.weight": "layers.{}.retention.out_proj.weight",
    "layers.{}.feed_forward_norm.weight": "layers.{}.final_layer_norm.weight",
    # the activation follows fc1, so fc1 is our gate; their `gate` is our other factor
    "layers.{}.feed_forward.gate_proj.weight": "layers.{}.ffn.fc1.weight",
    "layers.{}.feed_forward.up_proj.weight": "layers.{}.ffn.gate.weight",
    "layers.{}.feed_forward.down_proj.weight": "layers.{}.ffn.fc2.weight",
    "final_norm.weight": "layer_norm.weight",
}
NAMES: Table = {**DECODER_NAMES, "head.weight": "output_projection.weight"}

_DEFAULTS = {
    "decoder_embed_dim": 768,
    "decoder_value_embed_dim": 1280,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 1280,
    "decoder_layers": 12,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "layernorm_eps": 1e-6,
}
_ANGLE, _DECAY = "retnet_rel_pos.angle", "retnet_rel_pos.decay"


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """torchscale's arguments (RetNetConfig's attributes or keywords, a parsed command line) as our configuration."""
    refuse("torchscale", unsupported(source, {"moe_freq": 0, "multiway": False, "no_output_layer": False}))
    if source.get("chunkwise_recurrent"):
        warn_chunkwise("torchscale", "chunkwise_recurrent")
    # Their `deepnorm` leaves decoder_normalize_before as it is, so it occurs with pre-norm and with post-norm.
    return decoder_config(
        source,
        pre_norm=source.get("decoder_normalize_before", True),
        deepnorm=source.get("deepnorm", False),
        feed_forward=FeedForwardConfig(
            hidden_dim=_value(source, "decoder_ffn_embed_dim"),
            gated=True,
            activation=_value(source, "activation_fn"),
        ),
        decay="paper",
        name="torchscale",
        tie_embeddings=bool(source.get("share_decoder_input_output_embed", False)),
    )


def decoder_config(
    source: Mapping[str, Any],
    *,
    pre_norm: bool,
    deepnorm: bool,
    feed_forward: FeedForwardConfig,
    decay: str,
    **options: Any,
) -> ModelConfig:
    """The decoder that torchscale and syncdoth share; `options` are fields of ModelConfig."""
    width, depth, eps = (_value(source, key) for key in ("decoder_embed_dim", "decoder_layers", "layernorm_eps"))
    mixer = RetentionConfig(
        num_heads=_value(source, "decoder_retention_heads"),
        key_dim=width,
        value_dim=_value(source, "decoder_value_embed_dim"),
        decay=decay,
        decay_norm=True,
        rotary="interleaved",
        head_norm="rms",
        head_norm_eps=eps,
    )
    layer = BlockConfig(
        mixer,
        feed_forward,
        norm="rms",
        norm_eps=eps,
        norm_position="pre" if pre_norm else "post",
        skip_scale=(2.0 * depth) ** 0.25 if deepnorm else 1.0,
        dropout=_value(source, "dropout"),
    )
    return ModelConfig(
        vocab_size=source["vocab_size"],
        d_model=width,
        layers=(layer,) * depth,
        embedding_scale=1.0 if _value(source, "no_scale_embedding") else math.sqrt(width),
        embedding_norm="rms" if _value(source, "layernorm_embedding") else "none",
        final_norm="rms" if pre_norm else "none",
        norm_eps=eps,
        init="torchscale",
        **options,
    )


def settle(config: ModelConfig, tensors: Tensors, prefix: str = "") -> tuple[ModelConfig, set[str]]:
    """The configuration with the decays that a checkpoint stores, and the names of its buffers (decays and angles).

    The model was trained with these buffers. Raises ValueError for angles of another rotary convention.
    """
    consumed = {name for name in (prefix + _ANGLE, prefix + _DECAY) if name in tensors.specs}
    mixer = config.layers[0].mixer
    assert isinstance(mixer, RetentionConfig)
    if prefix + _ANGLE in consumed:
        angle = tensors.read(prefix + _ANGLE).cpu()
        wanted = frequencies(
            "interleaved", mixer.head_key_dim, mixer.rotary_base, dtype=torch.float64, device=torch.device("cpu")
        )
        if not _equal_as_stored(angle, wanted.repeat_interleave(2)):
            raise ValueError(f"{prefix}{_ANGLE} is not 10000^-linspace(0, 1, K / 2); accepted: these frequencies")
    if prefix + _DECAY in consumed:
        decay = tensors.read(prefix + _DECAY).cpu()
        expected = mixer.log_decay
        if expected is None or not _equal_as_stored(decay, expected):
            named = [name for name, schedule in SCHEDULES.items() if _equal_as_stored(decay, schedule(mixer.num_heads))]
            mixer = replace(mixer, decay=named[0] if named else tuple(decay.double().exp().tolist()))
            config = replace(config, layers=tuple(replace(layer, mixer=mixer) for layer in config.layers))
    return config, consumed


def warn_chunkwise(format: str, key: str) -> None:
    warnings.warn(
        f"{format}: {key} asks for their chunkwise form, which differs from their own parallel and recurrent forms; "
        "the converted model follows the latter",
        stacklevel=3,
    )


def _value(source: Mapping[str, Any], key: str) -> Any:
    value = source.get(key)
    return _DEFAULTS[key] if value is None else value


def _equal_as_stored(stored: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to a few roundings of the stored dtype; log(1 - x) is rounded twice, the first time near 1."""
    eps = torch.finfo(stored.dtype).eps
    return stored.shape == wanted.shape and torch.allclose(stored.double(), wanted.double(), rtol=8 * eps, atol=2**-24)


FORMAT = Format(
    name="torchscale",
    names=lambda config: NAMES,
    config_of=config_of,
    marker="layers.0.retention.q_proj.weight",
    embedding="embed_tokens.weight",
    prefix="decoder.",
    settle=settle,
)
