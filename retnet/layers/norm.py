"""Norms with weights, for blocks, feed-forwards and models.

The weights may be wider than the activations (float32 in a bfloat16 model). Norms compute in the dtype of the weights
and return the dtype of the activations.
"""

from typing import Literal

from torch import Tensor, nn

from retnet.ops.norms import Norm, layer_norm


class LayerNorm(nn.LayerNorm):
    """x [..., D] -> [..., D] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input.to(self.weight.dtype), self.weight, self.bias, self.eps).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """x [..., D] -> [..., D] in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def make_norm(kind: Norm | Literal["none"], width: int, eps: float) -> nn.Module:
    """A norm over the last dimension, [..., width] -> [..., width]."""
    if kind == "none":
        return nn.Identity()
    return LayerNorm(width, eps=eps) if kind == "layer" else RMSNorm(width, eps=eps)
