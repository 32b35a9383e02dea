"""Learned initial states: what every sequence starts from in place of zeros, as a module and as a snapshot.

A layer's learned tensors are those of constant size in its state: retention's and Mamba's memory, and what their short
convolutions still read. States with an entry per token (KV caches, Hyena's inputs) begin without tokens and have
nothing to learn. A learned state takes no token of a request and no position: text after it is read as text without it.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor, nn

from retnet.layers.mixers import kind_of
from retnet.layers.state import LayerState
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.models.states import ModelState
from retnet.ops.dtypes import wide_dtype


class LearnedState(nn.Module):
    """A learned initial state of a model: parameters "<layer>_<tensor>", [1, ...] float32 (float64), zero at first.

    fields: the names of each layer's learned tensors. left_out: by kind of mixer, the layers with one that has none.

    Raises ValueError for a model without anything to learn, and for a layer that takes no state.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        _check_takes_states(model.config)
        self.fields: list[tuple[str, ...]] = []
        self.left_out: dict[str, list[int]] = {}
        device = model.embedding.weight.device
        for i, layer in enumerate(model.init_state(1, device=torch.device("meta"))):
            found = _learned_tensors(layer)
            self.fields.append(tuple(found))
            for kind in {kind_of(leaf) for leaf in layer.leaves if not _learned_tensors(leaf)}:
                self.left_out.setdefault(kind, []).append(i)
            for name, x in found.items():
                start = torch.zeros(x.shape, device=device, dtype=wide_dtype(x.dtype))
                self.register_parameter(f"{i}_{name}", nn.Parameter(start))
        if not self.trained_layers:
            raise ValueError(
                f"the layers are {', '.join(sorted(self.left_out))}, which keep no state of constant size; accepted: a "
                "model with a layer of retention or Mamba"
            )

    def forward(self, model: LanguageModel, count: int) -> ModelState:
        """The state of `count` sequences before their first token. Gradients flow into the parameters."""
        layers = []
        for i, (empty, names) in enumerate(zip(model.init_state(count), self.fields, strict=True)):
            own = empty.tensors()
            layers.append(empty.replaced({name: self._tensor(i, name, own[name]) for name in names}))
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

    def _tensor(self, layer: int, name: str, empty: Tensor) -> Tensor:
        x: Tensor = getattr(self, f"{layer}_{name}")
        return x.to(empty.dtype).expand_as(empty)


def _check_takes_states(config: ModelConfig) -> None:
    for i, layer in enumerate(config.layers):
        if not layer.keeps_state:
            raise ValueError(f"layer {i} has keeps_state False; accepted for a learned state: layers that keep theirs")


def _learned_tensors(state: LayerState) -> dict[str, Tensor]:
    per_token = state.per_token
    return {name: x for name, x in state.tensors().items() if x.is_floating_point() and name not in per_token}
