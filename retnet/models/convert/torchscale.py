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
from retnet.layers.feed_forward import ACTIVATIONS, FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import choice, depth, flag, only, rate, read, size, unit_interval
from retnet.models.convert.table import Format, Table
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

DECODER_FIELDS = {
    "activation_fn": choice("gelu", *ACTIVATIONS),
    "decoder_embed_dim": size(768),
    "decoder_ffn_embed_dim": size(1280),
    "decoder_layers": depth(12),
    "decoder_normalize_before": flag(True),
    "decoder_retention_heads": size(3),
    "decoder_value_embed_dim": size(1280),
    "deepnorm": flag(False),
    "dropout": rate(0.0),
    "layernorm_embedding": flag(False),
    "layernorm_eps": unit_interval(1e-6),
    "no_scale_embedding": flag(True),
    "vocab_size": size(),
}
_FIELDS = {
    **DECODER_FIELDS,
    "chunkwise_recurrent": flag(False),
    "moe_freq": only(0),
    "multiway": only(False),
    "no_output_layer": only(False),
    "share_decoder_input_output_embed": flag(False),
}
_ANGLE, _DECAY = "retnet_rel_pos.angle", "retnet_rel_pos.decay"


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """torchscale's arguments (RetNetConfig's attributes or keywords, a parsed command line) as our configuration."""
    value = read("torchscale", source, _FIELDS, closed=False)  # a command line has many other arguments
    if value["chunkwise_recurrent"]:
        warn_chunkwise("torchscale", "chunkwise_recurrent")
    # Their `deepnorm` leaves decoder_normalize_before as it is, so it occurs with pre-norm and with post-norm.
    return decoder_config(
        value,
        pre_norm=value["decoder_normalize_before"],
        deepnorm=value["deepnorm"],
        feed_forward=FeedForwardConfig(
            hidden_dim=value["decoder_ffn_embed_dim"], gated=True, activation=value["activation_fn"]
        ),
        decay="paper",
        name="torchscale",
        tie_embeddings=value["share_decoder_input_output_embed"],
    )


def decoder_config(
    value: Mapping[str, Any],
    *,
    pre_norm: bool,
    deepnorm: bool,
    feed_forward: FeedForwardConfig,
    decay: str,
    **options: Any,
) -> ModelConfig:
    """The decoder that torchscale and syncdoth share. value: of DECODER_FIELDS; `options` are fields of ModelConfig."""
    width, num_layers, norm_eps = (value[key] for key in ("decoder_embed_dim", "decoder_layers", "layernorm_eps"))
    mixer = RetentionConfig(
        num_heads=value["decoder_retention_heads"],
        key_dim=width,
        value_dim=value["decoder_value_embed_dim"],
        decay=decay,
        decay_norm=True,
        rotary="interleaved",
        head_norm="rms",
        head_norm_eps=norm_eps,
    )
    layer = BlockConfig(
        mixer,
        feed_forward,
        norm="rms",
        norm_eps=norm_eps,
        norm_position="pre" if pre_norm else "post",
        skip_scale=(2.0 * num_layers) ** 0.25 if deepnorm else 1.0,
        dropout=value["dropout"],
    )
    return ModelConfig(
        vocab_size=value["vocab_size"],
        d_model=width,
        layers=(layer,) * num_layers,
        embedding_scale=1.0 if value["no_scale_embedding"] else math.sqrt(width),
        embedding_norm="rms" if value["layernorm_embedding"] else "none",
        final_norm="rms" if pre_norm else "none",
        norm_eps=norm_eps,
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
            if decay.shape != (mixer.num_heads,) or not decay.is_floating_point():
                given = f"{decay.dtype} {list(decay.shape)}"
                raise ValueError(
                    f"{prefix}{_DECAY} is {given}; accepted: a log decay for each of {mixer.num_heads} heads"
                )
            named = [name for name, schedule in SCHEDULES.items() if _equal_as_stored(decay, schedule(mixer.num_heads))]
            mixer = replace(mixer, decay=named[0] if named else tuple(decay.double().exp().tolist()))
            config = replace(config, layers=tuple(replace(layer, mixer=mixer) for layer in config.layers))
    return config, consumed


def warn_chunkwise(format: str, key: str) -> None:
    """Warn of torchscale's chunkwise form, which disagrees with its other forms."""
    warnings.warn(
        f"{format}: {key} asks for their chunkwise form, which differs from their own parallel and recurrent forms; "
        "the converted model follows the latter",
        stacklevel=3,
    )


def _equal_as_stored(stored: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to a few roundings of the stored dtype; log(1 - x) is rounded twice, the first time near 1."""
    if not stored.is_floating_point():
        return False
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
