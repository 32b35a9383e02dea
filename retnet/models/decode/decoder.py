"""A decoder for models that may change between two tokens: the fused step wherever it fits, or else the modules.

The engine owns its model and packs it once. Here the caller may load weights, train, add adapters or hooks, or run
other threads at any time; each token checks that the packed weights are still those of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from retnet.models.decode.fused import FusedModel
from retnet.models.decode.int8 import int8_parts
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.ops.derivatives import transforms_active

_lock = threading.RLock()
_calls: WeakKeyDictionary[LanguageModel, int] = WeakKeyDictionary()  # in progress, over all threads


class FusedDecoder:
    """The fused step of one generation. It owns the packed weights, which end with it if the model leaves them.

    int8: fuse int8 weights, whose product rounds its inputs to bfloat16 on a CPU, unlike the modules.
    """

    def __init__(self, model: LanguageModel, int8: bool = True):
        self.model = model
        self.fused: FusedModel | None = None
        self._fits = int8 or all(int8_parts(weight) is None for weight in model.parameters())

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState] | None:
        """tokens [B] -> (logits [B, vocab], the states after them); None where the modules must run."""
        if not self._fits or not can_fuse(self.model):
            self.fused = None
            return None
        if self.fused is None or not self.fused.is_current:
            self.fused = None  # frees the old weights before the new ones are packed
            self.fused = _pack_alone(self.model)
        if self.fused is None or not any(self.fused.blocks):
            return None
        return self.fused(tokens, state)

    def __deepcopy__(self, memo: dict) -> None:
        """Copies of a generation's cache pack for themselves."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def can_fuse(model: LanguageModel) -> bool:
    """Whether the model may decode fused here: no derivatives, training, compilation, autocast or global hooks."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or transforms_active():
        return False
    if model.training or torch.nn.modules.module._has_any_global_hook():
        return False
    device_type = model.embedding.weight.device.type
    return device_type != "meta" and not torch.is_autocast_enabled(device_type)


@contextmanager
def running(model: LanguageModel) -> Iterator[None]:
    """Counts a call that reads the model's weights: another thread may not move them meanwhile."""
    with _lock:
        _calls[model] = _calls.get(model, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _calls[model] -= 1


def _pack_alone(model: LanguageModel) -> FusedModel | None:
    """The model packed; None while other calls of `running` read weights that packing would free."""
    with _lock:
        return None if _calls.get(model, 0) > 1 else FusedModel(model)
