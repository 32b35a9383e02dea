"""syncdoth/RetNet, torchscale's architecture as a Hugging Face model: a directory with config.json and weights.

It adds an ungated feed-forward with sub-layer norm (`use_glu: false`) and the decays of the paper's experiments
(`use_lm_decay`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet.layers.feed_forward import FeedForwardConfig
from retnet.models.config import ModelConfig
from retnet.models.convert import torchscale
from retnet.models.convert.table import Format, Table, token_ids, warn_unknown
from retnet.models.tensor_files import Tensors

PREFIX = "model."
NAMES: Table = {
    **{ours: PREFIX + theirs for ours, theirs in torchscale.DECODER_NAMES.items()},
    "head.weight": "lm_head.weight",
}
MLP_NAMES: Table = {
    **NAMES,
    "layers.{}.feed_forward.up_proj.weight": "model.layers.{}.ffn.fc1.weight",
    "layers.{}.feed_forward.up_proj.bias": "model.layers.{}.ffn.fc1.bias",
    "layers.{}.feed_forward.inner_norm.weight": "model.layers.{}.ffn.ffn_layernorm.weight",
    "layers.{}.feed_forward.inner_norm.bias": "model.layers.{}.ffn.ffn_layernorm.bias",
    "layers.{}.feed_forward.down_proj.bias": "model.layers.{}.ffn.fc2.bias",
}

# Keys that config_of reads, and keys that concern only training or the way to compute.
_KNOWN = {
    "activation_fn", "bos_token_id", "decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_layers",
    "decoder_normalize_before", "decoder_retention_heads", "decoder_value_embed_dim", "deepnorm", "dropout",
    "eos_token_id", "forward_impl", "layernorm_embedding", "layernorm_eps", "no_scale_embedding", "pad_token_id",
    "subln", "tie_word_embeddings", "use_ffn_rms_norm", "use_glu", "use_lm_decay", "vocab_size",
    "activation_dropout", "disable_fused_ops", "drop_path_rate", "initializer_range", "output_retentions",
    "recurrent_chunk_size", "unk_token_id", "z_loss_coeff",
}  # fmt: skip


def names(config: ModelConfig) -> Table:
    """The table of a model with or without gated feed-forward."""
    feed_forward = config.layers[0].feed_forward
    return NAMES if feed_forward is None or feed_forward.gated else MLP_NAMES


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    warn_unknown("syncdoth", source, _KNOWN)
    if source.get("forward_impl") == "chunkwise":
        torchscale.warn_chunkwise("syncdoth", "forward_impl")
    # Their constructor resolves contradictions in this order.
    deepnorm, subln = source.get("deepnorm", False), source.get("subln", True)
    pre_norm = source.get("decoder_normalize_before", True)
    if deepnorm:
        pre_norm, subln = False, False
    if subln:
        pre_norm = True
    eps = source.get("layernorm_eps", 1e-6)
    gated = source.get("use_glu", True)
    inner_norm = "none" if gated or not subln else "rms" if source.get("use_ffn_rms_norm") else "layer"
    return torchscale.decoder_config(
        source,
        pre_norm=pre_norm,
        deepnorm=deepnorm,
        feed_forward=FeedForwardConfig(
            hidden_dim=source.get("decoder_ffn_embed_dim", 1280),
            gated=gated,
            activation=source.get("activation_fn", "gelu"),
            bias=not gated,
            inner_norm=inner_norm,
            inner_norm_eps=eps,
        ),
        decay="experiment" if source.get("use_lm_decay") else "paper",
        name="syncdoth",
        tie_embeddings=source.get("tie_word_embeddings", False),
        **token_ids(source),
    )


def settle(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, set[str]]:
    """`torchscale.settle`: the checkpoints hold the same buffers."""
    return torchscale.settle(config, tensors, PREFIX)


FORMAT = Format(
    name="syncdoth",
    names=names,
    config_of=config_of,
    marker="model.layers.0.retention.q_proj.weight",
    embedding="model.embed_tokens.weight",
    settle=settle,
)
