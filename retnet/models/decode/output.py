"""The output projection of a branch in the fused decode step, added to the residual stream."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from retnet.layers.tensor_parallel import OutputLinear
from retnet.models.decode.packing import pack
from retnet.ops.decode.linear import NO_NORM, InputNorm, decode_linear


class FusedOutput:
    """x <- skip x + branch (y W^T + bias). Of a layer that is split over processes, the sum of their products."""

    def __init__(self, linear: nn.Linear, skip: float, branch: float):
        self.skip, self.branch = skip, branch
        self.weight = pack([linear])
        self.shard = linear.shard if isinstance(linear, OutputLinear) else None
        self.bias = self.weight.bias
        if self.shard is not None:  # added once, to the sum
            self.weight = replace(self.weight, bias=None)

    def __call__(
        self,
        x: Tensor,
        y: Tensor | None,
        *,
        norm: InputNorm = NO_NORM,
        gate: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """x [S, D], overwritten, from the branch's y [S, K]; y, norm, gate and activation as for `decode_linear`."""
        if self.shard is None:
            scales = {"skip": self.skip, "branch": self.branch}
            return decode_linear(y, self.weight, norm=norm, gate=gate, activation=activation, residual_=x, **scales)
        out = self.shard.sum_(decode_linear(y, self.weight, norm=norm, gate=gate, activation=activation))
        if self.bias is not None:
            out += self.bias
        if self.skip != 1.0:
            x.mul_(self.skip)
        return x.add_(out, alpha=self.branch)
