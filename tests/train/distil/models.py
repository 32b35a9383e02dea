"""A small Transformer of bytes as a teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.models.lm import LanguageModel
from tests.small_models import BYTES, GLU, random_ids, small_model

LLAMA = BlockConfig(AttentionConfig(4, 2, head_dim=8), GLU, norm="rms")


def teacher(num_layers: int = 2, *, options: dict[str, Any] | None = None, **attention: Any) -> LanguageModel:
    """Layers of grouped-query attention, whose fields `attention` changes; options: fields of ModelConfig."""
    block = replace(LLAMA, mixer=replace(LLAMA.mixer, **attention))
    return small_model((block,) * num_layers, final_norm="rms", **(BYTES | (options or {}))).requires_grad_(False)


def sample(tokens: int = 48, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two documents laid end to end."""
    ids = random_ids(1, tokens + 1, high=256, seed=seed)
    targets = ids[0, 1:].clone()
    targets[17] = -100
    return ids[:, :-1], targets, torch.tensor([0, 18, tokens])
