"""The norms with weights that blocks, feed-forwards and models share."""

from typing import Literal

from torch import nn

from retnet.ops.norms import Norm


def make_norm(kind: Norm | Literal["none"], width: int, eps: float) -> nn.Module:
    """A norm over the last dimension, [..., width] -> [..., width]."""
    if kind == "none":
        return nn.Identity()
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else nn.RMSNorm(width, eps=eps)
