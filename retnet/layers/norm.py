"""The norms with weights that blocks, feed-forwards and models share.

Their weights may be wider than the activations (float32 in a bfloat16 model): they compute in the weights' dtype and
answer in the activations'.
"""

from typing import Literal

from torch import Tensor, nn

from retnet.ops.norms import Norm


class LayerNorm(nn.LayerNorm):
    """x [..., D] -> [..., D] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """x [..., D] -> [..., D] in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def make_norm(kind: Norm | Literal["none"], width: int, eps: float) -> nn.Module:
    """A norm over the last dimension, [..., width] -> [..., width]."""
    if kind == "none":
        return nn.Identity()
    return LayerNorm(width, eps=eps) if kind == "layer" else RMSNorm(width, eps=eps)
