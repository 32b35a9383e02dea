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
from retnet.models.convert.fields import (
    at_least_zero,
    choice,
    flag,
    ignored,
    only,
    rate,
    read,
    size,
    token_ids,
    unit_interval,
)  # fmt: skip
from retnet.models.convert.table import Format, Table
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

_FIELDS = {
    **torchscale.DECODER_FIELDS,
    "model_type": only("retnet"),
    "forward_impl": choice("parallel", "parallel", "recurrent", "chunkwise"),
    "subln": flag(True),
    "tie_word_embeddings": flag(False),
    "use_ffn_rms_norm": flag(False),
    "use_glu": flag(True),
    "use_lm_decay": flag(False),
    # that concern only training or the way to compute
    "activation_dropout": rate(0.0), "disable_fused_ops": flag(False), "drop_path_rate": rate(0.0),
    "initializer_range": unit_interval(0.02), "output_retentions": flag(False), "recurrent_chunk_size": size(None),
    "unk_token_id": ignored("an integer", int), "z_loss_coeff": at_least_zero(0.0),
}  # fmt: skip


def names(config: ModelConfig) -> Table:
    """The table of a model with or without gated feed-forward."""
    feed_forward = config.layers[0].feed_forward
    return NAMES if feed_forward is None or feed_forward.gated else MLP_NAMES


def config_of(source: Mapping[str, Any]) -> ModelConfig:
    """Their config.json as our configuration."""
    value = read("syncdoth", source, _FIELDS)
    if value["forward_impl"] == "chunkwise":
        torchscale.warn_chunkwise("syncdoth", "forward_impl")
    # Their constructor resolves contradictions in this order.
    deepnorm, subln, pre_norm = (value[key] for key in ("deepnorm", "subln", "decoder_normalize_before"))
    if deepnorm:
        pre_norm, subln = False, False
    if subln:
        pre_norm = True
    gated = value["use_glu"]
    inner_norm = "none" if gated or not subln else "rms" if value["use_ffn_rms_norm"] else "layer"
    return torchscale.decoder_config(
        value,
        pre_norm=pre_norm,
        deepnorm=deepnorm,
        feed_forward=FeedForwardConfig(
            hidden_dim=value["decoder_ffn_embed_dim"],
            gated=gated,
            activation=value["activation_fn"],
            bias=not gated,
            inner_norm=inner_norm,
            inner_norm_eps=value["layernorm_eps"],
        ),
        decay="experiment" if value["use_lm_decay"] else "paper",
        name="syncdoth",
        tie_embeddings=value["tie_word_embeddings"],
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
