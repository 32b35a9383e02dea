"""Activations that a training step holds between forward and backward, by recompute level.

They are counted, not derived: each layer runs on tensors without memory (FakeTensorMode), and what is alive after its
forward is what its backward will read, whoever saved it. The operators are those of a CPU in eager mode: on a GPU,
short convolutions keep their input alone, and torch.compile keeps less at level "none".
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from retnet.layers.block import Block, BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.moe import MoEConfig
from retnet.layers.recompute import Level, with_losses
from retnet.layers.token_layout import TokenLayout
from retnet.models.config import ModelConfig

_SIZES = 64, 128  # tokens; the difference leaves out what does not grow with them, such as weights cast by autocast


class AliveStorages(TorchDispatchMode):
    """Memory that operators allocate while the mode is on, as long as something refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: WeakValueDictionary[int, Any] = WeakValueDictionary()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in given:
                self._alive[storage._cdata] = storage
        return results

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._alive.values())


def activation_bytes(config: ModelConfig, level: Level, *, autocast: bool = True) -> float:
    """Bytes per token that all layers hold for the backward of a training step, their inputs included.

    autocast: in bfloat16 as with `bf16=true`; otherwise in the configuration's dtype. A mixture of experts is counted
    as one feed-forward as wide as the experts of a token, shared ones included. Dropout masks count where the
    configuration has dropout.
    """
    return sum(_layer_bytes(layer, config.d_model, config.torch_dtype, level, autocast) for layer in config.layers)


def working_bytes(config: ModelConfig, *, autocast: bool = True) -> float:
    """Bytes per token of the layer that holds the most while its backward runs, with all its activations."""
    counted = (_layer_bytes(layer, config.d_model, config.torch_dtype, "none", autocast) for layer in config.layers)
    return max(counted, default=0.0)


@lru_cache(maxsize=256)
def _layer_bytes(layer: BlockConfig, d_model: int, dtype: torch.dtype, level: Level, autocast: bool) -> float:
    feed_forward = layer.feed_forward
    if isinstance(feed_forward, MoEConfig):  # whose shapes depend on values
        width = feed_forward.top_k * feed_forward.hidden_dim + (feed_forward.shared_hidden_dim or 0)
        gated, activation = feed_forward.gated, feed_forward.activation
        layer = replace(layer, feed_forward=FeedForwardConfig(width, gated, activation, feed_forward.bias))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
            block = Block(layer, d_model).train()
            few, many = (_held(block, d_model, tokens, level, autocast) for tokens in _SIZES)
    finally:
        torch.set_default_dtype(before)
    return (many - few) / (_SIZES[1] - _SIZES[0])


def _held(block: Block, d_model: int, tokens: int, level: Level, autocast: bool) -> int:
    """Bytes alive after the forward of `tokens` tokens, its result (the input of the next layer) included."""
    x = torch.empty(1, tokens, d_model, requires_grad=True)
    layout = TokenLayout.of((1, tokens), x.device, losses=[], recompute="none" if level == "layer" else level)
    block.prepare(layout, x.dtype)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(), AliveStorages() as alive:
        if level == "layer":
            y = checkpoint(with_losses, block, x, None, layout, use_reentrant=False)[0]
        else:
            y = block(x, None, layout)[0]
        assert y.requires_grad
        return alive.nbytes
