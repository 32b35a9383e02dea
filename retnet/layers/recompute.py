"""Recompute policies: which activations a training step keeps, and which its backward computes again.

    level    held per layer, beside its input                   computed again in the backward
    none     what the derivatives of its operators read         nothing
    light    results of products, attention, retention, scans   norms, rotary, gates, short convolutions, activations
    medium   products of the mixer, results of attention        these, retention, scans, and the feed-forward
    layer    nothing                                            the layer

Recomputed numbers are those of the forward, bit for bit where its operators are deterministic, and random numbers are
drawn again from the same state. `light` and `medium` divide a layer into its two branches, each with PyTorch's
selective activation checkpointing, which works inside torch.compile too. Their graphs can be differentiated once.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from retnet.layers.token_layout import TokenLayout
from retnet.system.choices import check_choices

Level = Literal["none", "light", "medium", "layer"]
LEVELS: tuple[Level, ...] = get_args(Level)
Branch = Callable[[Tensor, Any, TokenLayout], tuple[Tensor, Any]]  # (x, state, layout) -> (y, state)

# Operators by name: not every version of PyTorch has all of them.
PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::_scaled_mm"})
# Quadratic in the length of a row, so only `layer` computes it again.
ATTENTION = frozenset({
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flex_attention",
    "retnet::ring_attention",
})  # fmt: skip
# aten::_fft_c2r ends a long convolution.
LINEAR_TIME = frozenset({
    "retnet::retention", "retnet::context_retention", "retnet::selective_scan", "aten::_fft_c2r"
})  # fmt: skip
EXCHANGES = frozenset({"retnet::shard_carry", "retnet::shard_recent"})  # small results from other shards

_last_product: ContextVar[bool] = ContextVar("last_product", default=False)


@dataclass(frozen=True)
class Recompute:
    """What a model recomputes in training. offload: inputs of layers wait on the host, with level "layer"."""

    level: Level = "none"
    offload: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.offload and self.level != "layer":
            raise ValueError(f"offload is True with recompute {self.level!r}; accepted with offload: 'layer'")


def kept_results(level: Level) -> tuple[frozenset[str], frozenset[str]]:
    """The operators whose results `light` and `medium` hold: of mixers, and of feed-forwards."""
    if level == "medium":
        return PRODUCTS | ATTENTION | EXCHANGES, frozenset()
    return PRODUCTS | ATTENTION | EXCHANGES | LINEAR_TIME, PRODUCTS


def recomputed(run: Branch, kept: frozenset[str], x: Tensor, state: Any, layout: TokenLayout) -> tuple[Tensor, Any]:
    """run(x, state, layout), of whose activations the results of the operators in `kept` alone are held."""
    contexts: dict[str, Any] = {}
    if kept:
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    y, state, own = checkpoint(with_losses, run, x, state, layout, use_reentrant=False, **contexts)
    if layout.losses is not None and own is not None:
        layout.losses.append(own)
    return y, state


def with_losses(run: Branch, x: Tensor, state: Any, layout: TokenLayout) -> tuple[Tensor, Any, Tensor | None]:
    """run(x, state, layout) and the sum of its own losses, which only as a result have a gradient if recomputed."""
    losses: list[Tensor] | None = None if layout.losses is None else []
    y, state = run(x, state, layout.with_losses(losses))
    return y, state, torch.stack(losses).sum() if losses else None


def last_product(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x) at the end of a branch. No policy keeps its result: nothing of the branch is computed from it."""
    if torch.compiler.is_compiling() or type(linear) is not nn.Linear:  # an adapter computes more from the product
        return linear(x)
    token = _last_product.set(True)
    try:
        return linear(x)
    finally:
        _last_product.reset(token)


def _policy(kept: frozenset[str], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op.name() in kept and not _last_product.get()
    return CheckpointPolicy.MUST_SAVE if keep or _draws(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(op: Any) -> bool:
    """Whether the operator returns random numbers, which compiled graphs could not draw again."""
    if not isinstance(op, torch._ops.OpOverload):  # one of higher order
        return False
    return torch.Tag.nondeterministic_seeded in op.tags and not op._schema.is_mutable
