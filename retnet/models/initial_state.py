"""Learned initial states: what every sequence starts from in place of zeros, as a module and as a snapshot.

A layer's learned tensors are those of constant size in its state: retention's and Mamba's memory, and what their short
convolutions still read. States with an entry per token (KV caches, Hyena's inputs) begin without tokens and have
nothing to learn. A learned state takes no token of a request and no position: text after it is read as text without it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from retnet.layers.block import Block
from retnet.layers.state import LayerState
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.models.states import ModelState
from retnet.ops.dtypes import wide_dtype


class LearnedState(nn.Module):
    """A learned initial state of a model: parameters "<layer>_<field>", [1, ...] float32 (float64), zero at first.

    Raises ValueError for a model without anything to learn.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        check_learnable(model.config)
        self.fields: list[tuple[str, ...]] = []
        device = model.embedding.weight.device
        for i, layer in enumerate(model.init_state(1, device=torch.device("meta"))):
            found = _learned_fields(layer)
            self.fields.append(tuple(found))
            for name, x in found.items():
                start = torch.zeros(x.shape, device=device, dtype=wide_dtype(x.dtype))
                self.register_parameter(f"{i}_{name}", nn.Parameter(start))
        if not any(self.fields):
            kinds = sorted({layer.mixer.kind for layer in model.config.layers})
            raise ValueError(
                f"the layers are {', '.join(kinds)}, which keep no state of constant size; accepted: a model with a "
                "layer of retention or Mamba"
            )

    def forward(self, model: LanguageModel, count: int) -> ModelState:
        """The state of `count` sequences before their first token. Gradients flow into the parameters."""
        weight = model.embedding.weight
        layers = []
        for i, (block, names) in enumerate(zip(model.layers, self.fields, strict=True)):
            empty = cast(Block, block).mixer.init_state(count, weight.device, weight.dtype)
            learned = {name: self._tensor(i, name, empty, count) for name in names}
            layers.append(replace(empty, **learned))
        return ModelState(tuple(layers))

    def snapshot(self, model: LanguageModel, document_start: int, fingerprint: str) -> Snapshot:
        """The learned state as a value to save and to start requests from. fingerprint: of the model."""
        with torch.no_grad():
            state = self(model, 1).clone()
        return Snapshot(state, array("i", [document_start]), fingerprint)

    @property
    def trained_layers(self) -> list[int]:
        """The numbers of the layers that learn a state."""
        return [i for i, names in enumerate(self.fields) if names]

    def _tensor(self, layer: int, name: str, empty: LayerState, count: int) -> Tensor:
        x: Tensor = getattr(self, f"{layer}_{name}")
        return x.to(getattr(empty, name).dtype).expand(count, *x.shape[1:])


def check_learnable(config: ModelConfig) -> None:
    """Raise ValueError for a layer that takes no state."""
    for i, layer in enumerate(config.layers):
        if not layer.keeps_state:
            raise ValueError(f"layer {i} has keeps_state False; accepted for a learned state: layers that keep theirs")


def layers_left_out(config: ModelConfig, trained: list[int]) -> Iterator[tuple[str, list[int]]]:
    """The mixers whose layers have nothing to learn, with the numbers of their layers."""
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(config.layers):
        if i not in trained:
            kinds.setdefault(layer.mixer.kind, []).append(i)
    yield from kinds.items()


def _learned_fields(state: LayerState) -> dict[str, Tensor]:
    return {name: x for name, x in state.tensors().items() if x.is_floating_point() and name not in state.PER_TOKEN}
