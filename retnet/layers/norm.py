"""Norms with weights, for blocks, feed-forwards and models.

The weights may be wider than the activations (float32 in a bfloat16 model). Norms compute in the dtype of the weights
and return the dtype of the activations.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retnet.ops.norms import Norm, layer_norm, normalize

HeadNorm = Literal["rms", "l2", "none"]  # of q and k: mean square 1 and learnt weights; length 1; none


class LayerNorm(nn.LayerNorm):
    """x [..., D] -> [..., D] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input.to(self.weight.dtype), self.weight, self.bias, self.eps).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """x [..., D] -> [..., D] in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def check_eps(config: Any, name: str) -> None:
    """Raise ValueError unless field `name` of a configuration can be the eps of a norm."""
    eps = getattr(config, name)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name} is {eps}; accepted: a number of at least 0")


def make_norm(kind: Norm | Literal["none"], width: int, eps: float) -> nn.Module:
    """A norm over the last dimension, [..., width] -> [..., width]."""
    if kind == "none":
        return nn.Identity()
    return LayerNorm(width, eps=eps) if kind == "layer" else RMSNorm(width, eps=eps)


def head_norm_weight(kind: HeadNorm, width: int) -> nn.Parameter | None:
    """The weights [K] of `normed_heads`, which all heads share; None where the norm has none."""
    return nn.Parameter(torch.ones(width)) if kind == "rms" else None


def normed_heads(x: Tensor, kind: HeadNorm, eps: float, weight: Tensor | None) -> Tensor:
    """Heads of q or k [..., K] before their rotation, in x's dtype."""
    if kind == "none":
        return x
    if kind == "l2":
        width = x.shape[-1]
        return (width**-0.5 * normalize(x, "rms", eps / width)).to(x.dtype)
    y = normalize(x, "rms", eps)
    return (y if weight is None else y * weight).to(x.dtype)
