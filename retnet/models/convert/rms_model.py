"""Models with RMS norms and normal initial weights, as the configurations of most libraries describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retnet.layers.block import BlockConfig
from retnet.models.config import ModelConfig
from retnet.models.convert.fields import token_ids


def rms_model(
    name: str,
    source: Mapping[str, Any],
    value: Mapping[str, Any],
    layers: Sequence[BlockConfig],
    norm_eps: float,
    tokens: Mapping[str, int],
    **options: Any,
) -> ModelConfig:
    """The configuration of a model of these layers.

    Args:
        source: their config.json as it is, which may hold token ids; tokens: those that it has by default.
        value: its fields, as `read` returns them.
        norm_eps: of the final norm.
        options: further fields of ModelConfig.
    """
    return ModelConfig(
        vocab_size=value["vocab_size"],
        d_model=value["hidden_size"],
        layers=tuple(layers),
        name=name,
        tie_embeddings=value["tie_word_embeddings"],
        final_norm="rms",
        norm_eps=norm_eps,
        init="normal",
        init_std=value["initializer_range"],
        **token_ids(source, **tokens),
        **options,
    )
