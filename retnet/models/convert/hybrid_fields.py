"""Fields that the configurations of transformers' hybrids of attention and Mamba share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retnet.layers.block import BlockConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import (
    depth,
    flag,
    head_problems,
    head_width,
    ignored,
    only,
    positive,
    rate,
    refuse,
    size,
    times,
    unit_interval,
)
from retnet.models.convert.rms_model import rms_model

SHARED_FIELDS = {
    "attention_dropout": rate(0.0),
    "head_dim": size(None),
    "hidden_act": only("silu", "swish"),
    "hidden_size": size(4096),
    "initializer_range": unit_interval(0.02),
    "intermediate_size": size(14336),
    "mamba_conv_bias": flag(True),
    "mamba_d_conv": size(4),
    "mamba_expand": times(2),
    "mamba_proj_bias": flag(False),
    "num_attention_heads": size(32),
    "num_hidden_layers": depth(32),
    "num_key_value_heads": size(8, null=None),
    "tie_word_embeddings": flag(False),
    "vocab_size": size(),
    # without effect on outputs: initialisation, the longest text of training, how many logits a call computes, kernels
    "calc_logits_for_entire_prompt": flag(False), "mamba_chunk_size": size(None), "n_ctx": size(None),
    "num_logits_to_keep": size(None, least=0), "time_step_floor": positive(None), "time_step_max": positive(None),
    "time_step_min": positive(None), "time_step_rank": ignored("an integer, or text", (int, str)),
    "use_associative_scan": flag(True), "use_mamba_kernels": flag(True), "use_mambapy": flag(False),
}  # fmt: skip


def inner_width(name: str, value: Mapping[str, Any]) -> int:
    """The width of Mamba's x. Raises ValueError where it is no integer."""
    inner = value["mamba_expand"] * value["hidden_size"]
    if inner != int(inner):
        refuse(name, [f"mamba_expand is {value['mamba_expand']}; accepted: an integer times hidden_size"])
    return int(inner)


def heads_of(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of AttentionConfig that its heads give."""
    heads = value["num_attention_heads"]
    refuse(name, head_problems(value))
    return {
        "num_heads": heads,
        "num_kv_heads": value["num_key_value_heads"] or heads,
        "head_dim": head_width(value),
        "dropout": value["attention_dropout"],
    }


def mamba_options(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that Mamba1Config and Mamba2Config share."""
    return {
        "state_dim": value["mamba_d_state"],
        "conv_width": value["mamba_d_conv"],
        "conv_bias": value["mamba_conv_bias"],
        "bias": value["mamba_proj_bias"],
    }


def hybrid_model(
    name: str, source: Mapping[str, Any], value: Mapping[str, Any], layers: list[BlockConfig], **options: Any
) -> ModelConfig:
    """A model of these layers, with what the hybrids' configurations share. source: their config.json as it is."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return rms_model(name, source, value, layers, value["rms_norm_eps"], tokens, **options)
