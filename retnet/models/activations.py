"""Activations that a training step holds between forward and backward, by recompute level.

They are counted, not derived: each layer runs on tensors without memory (FakeTensorMode), and what is alive after its
forward is what its backward will read, whoever saved it. The operators are those of a CPU in eager mode: on a GPU,
short convolutions keep their input alone, and torch.compile keeps less at level "none".
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from retnet.layers.block import Block, BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.moe import MoEConfig
from retnet.layers.multi_token import MultiTokenConfig, MultiTokenPrediction, Run
from retnet.layers.recompute import Level, with_losses
from retnet.layers.streams import StreamsConfig
from retnet.layers.token_layout import TokenLayout
from retnet.models.config import ModelConfig

Part = Block | MultiTokenPrediction
Step = Callable[[Any, Tensor, TokenLayout, Run], Tensor]  # (part, x, layout, how blocks run) -> its result
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
    """Bytes per token that all layers and modules of multi-token prediction hold for the backward of a training step,
    their inputs included.

    autocast: in bfloat16 as with `bf16=true`; otherwise in the configuration's dtype. A mixture of experts is counted
    as one feed-forward as wide as the experts of a token, shared ones included. Dropout masks count where the
    configuration has dropout.
    """
    held = sum(_layer_bytes(layer, config.d_model, config.torch_dtype, level, autocast) for layer in config.layers)
    if config.mtp is not None:
        held += config.mtp.num_modules * _module_bytes(config.mtp, config.d_model, config.torch_dtype, level, autocast)
    return held


def working_bytes(config: ModelConfig, *, autocast: bool = True) -> float:
    """Bytes per token of the layer that holds the most while its backward runs, with all its activations."""
    counted = (_layer_bytes(layer, config.d_model, config.torch_dtype, "none", autocast) for layer in config.layers)
    return max(counted, default=0.0)


@lru_cache(maxsize=256)
def _layer_bytes(layer: BlockConfig, d_model: int, dtype: torch.dtype, level: Level, autocast: bool) -> float:
    made = partial(_block_among_equals, _with_equal_shapes(layer))
    return _held_per_token(
        made, lambda block, x, layout, run: run(block, x, None, layout)[0], d_model, dtype, level, autocast
    )


def _block_among_equals(layer: BlockConfig, d_model: int) -> Block:
    """A block whose neighbours have as many residual streams as it has."""
    block = Block(layer, d_model)
    block.takes_streams = block.gives_streams = layer.hyper is not None
    return block


@lru_cache(maxsize=64)
def _module_bytes(mtp: MultiTokenConfig, d_model: int, dtype: torch.dtype, level: Level, autocast: bool) -> float:
    """As `_layer_bytes`, of one module of multi-token prediction."""
    made = partial(MultiTokenPrediction, replace(mtp, block=_with_equal_shapes(mtp.block), num_modules=1))
    return _held_per_token(
        made, lambda modules, x, layout, run: modules(x, x, None, layout, run)[0][0], d_model, dtype, level, autocast
    )


def _with_equal_shapes(layer: BlockConfig) -> BlockConfig:
    """The layer with one feed-forward in place of a mixture of experts, whose shapes depend on values."""
    if isinstance(layer.mixer, StreamsConfig):
        layer = replace(layer, mixer=layer.mixer.with_blocks(map(_with_equal_shapes, layer.mixer.blocks)))
    moe = layer.feed_forward
    if not isinstance(moe, MoEConfig):
        return layer
    width = moe.top_k * moe.hidden_dim + (moe.shared_hidden_dim or 0)
    return replace(layer, feed_forward=FeedForwardConfig(width, moe.gated, moe.activation, moe.bias))


def _held_per_token(
    make: Callable[[int], Part], step: Step, d_model: int, dtype: torch.dtype, level: Level, autocast: bool
) -> float:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
            part = make(d_model)
            part.train()
            few, many = (_held(part, step, d_model, tokens, level, autocast) for tokens in _SIZES)
    finally:
        torch.set_default_dtype(before)
    return (many - few) / (_SIZES[1] - _SIZES[0])


def _held(part: Part, step: Step, d_model: int, tokens: int, level: Level, autocast: bool) -> int:
    """Bytes alive after the forward of `tokens` tokens, its result (the input of the next layer) included."""
    streams = part.config.hyper if isinstance(part, Block) else None
    width = d_model if streams is None else streams.num_streams * d_model
    x = torch.empty(1, tokens, width, requires_grad=True)
    layout = TokenLayout.of((1, tokens), x.device, losses=[], recompute="none" if level == "layer" else level)

    part.prepare(layout, x.dtype)

    def run(block: nn.Module, x: Tensor, state: None, layout: TokenLayout) -> tuple[Tensor, Any]:
        if level == "layer":
            return checkpoint(with_losses, block, x, state, layout, use_reentrant=False)[:2]
        return block(x, state, layout)

    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(), AliveStorages() as alive:
        y = step(part, x, layout, run)
        assert y.requires_grad
        return alive.nbytes
