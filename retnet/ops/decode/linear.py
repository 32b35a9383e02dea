"""A linear layer of few rows with its input norm, gate and residual: the products of a decode step.

    decode_linear   skip residual + branch (y W^T + bias)       y = norm(x) * act(gate)

Layers define these operations; here they are fused for inference: no gradients, no checks of values. On a GPU they are
one launch while there are few rows (`kernels/decode/linear.py`); on a CPU, the time is that of reading the weights with
all cores.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops import device
from retnet.ops.dtypes import widened
from retnet.ops.norms import normalize

MATVEC_ROWS = 1  # up to this many rows, a GPU's product is bound by reading weights, without tensor cores
INT8_ROWS = 4  # up to this many rows, int8 weights are read once per row rather than widened in memory
# Blocks of rows of a weight that a CPU multiplies as a batch: MKL uses one core for a product of few rows, all for a
# batch. The first that divides the number of rows.
ROW_BLOCKS = (32, 16, 8, 4, 2, 1)
# For more rows one product is faster on one core (retnet-tiny, batch 64: 16.3 ms per step; 19.7 in blocks; 17.2 by the
# modules) and no slower on two.
BLOCK_PRODUCT_ROWS = 16
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu, "sigmoid": torch.sigmoid, "none": lambda x: x}


@dataclass(frozen=True)
class InputNorm:
    """A norm over each of `groups` equal parts of a row; weight and bias [width of a part], or of the whole row."""

    kind: Literal["layer", "rms", "none"] = "none"
    groups: int = 1
    eps: float = 1e-6
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, K], in float32 (float64 for float64)."""
        x = widened(x)
        if self.kind == "none":
            return x
        width = x.shape[1] // self.groups
        parts = x if self.groups == 1 else x.view(-1, self.groups, width)
        weight, bias = self.weight, self.bias
        if weight is not None and weight.dtype == x.dtype and weight.numel() == width:  # in the norm's own pass
            weight = weight.view(width)
            if self.kind == "layer":
                parts = F.layer_norm(parts, (width,), weight, bias, self.eps)
                return parts if self.groups == 1 else parts.flatten(1)
            parts, weight = F.rms_norm(parts, (width,), weight, self.eps), None
        else:
            parts = normalize(parts, self.kind, self.eps)
        if weight is not None:
            parts = parts * weight.view(-1, width)[0 if self.groups == 1 else slice(None)]
        if bias is not None:
            parts = parts + bias.view(-1, width)[0 if self.groups == 1 else slice(None)]
        return parts if self.groups == 1 else parts.flatten(1)


@dataclass(frozen=True)
class DecodeWeight:
    """values [N, K], floating point, or int8 with scale [N] that multiplies the rows; bias [N]."""

    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @cached_property
    def blocks(self) -> Tensor:
        """A view for a CPU: [n, N / n, K]."""
        N, K = self.values.shape
        n = next(n for n in ROW_BLOCKS if N % n == 0)
        return self.values.view(n, N // n, K)

    @cached_property
    def ones(self) -> Tensor:
        """[N], for a product whose scale is applied after it, in its own precision."""
        return torch.ones(self.values.shape[0], dtype=torch.bfloat16, device=self.values.device)


NO_NORM = InputNorm()


def decode_linear(
    x: Tensor | None,
    weight: DecodeWeight,
    *,
    norm: InputNorm = NO_NORM,
    gate: Tensor | None = None,
    activation: str = "none",
    residual_: Tensor | None = None,
    skip: float = 1.0,
    branch: float = 1.0,
) -> Tensor:
    """skip residual + branch (y W^T + bias) [B, N], with y = norm(x) * activation(gate), in x's dtype.

    Args:
        x, gate: [B, K]; either may be None and is then left out.
        weight: W [N, K] with its scale and bias.
        residual_: [B, N], overwritten with the result; a plain product if None.
    """
    rows_in = x if x is not None else gate
    assert rows_in is not None
    if not device.uses_kernels(rows_in):
        return _linear_on_cpu(x, weight, norm, gate, activation, residual_, skip, branch)
    from retnet.kernels.decode.linear import matvec, prepare

    described = (norm.kind, norm.groups, norm.eps, norm.weight, norm.bias)
    if len(rows_in) <= (MATVEC_ROWS if weight.scale is None else INT8_ROWS):
        out = rows_in.new_empty(len(rows_in), len(weight.values)) if residual_ is None else residual_
        for rows in zip(*(x.split(MATVEC_ROWS) if x is not None else _nones(rows_in) for x in (x, gate, out))):
            matvec(
                rows[0], rows[1], weight.values, weight.scale, weight.bias, described, activation, rows[2],
                None if residual_ is None else rows[2], skip, branch,
            )  # fmt: skip
        return out
    y = rows_in
    if gate is not None or norm.kind != "none":
        y = torch.empty_like(rows_in, memory_format=torch.contiguous_format)
        prepare(x, gate, described, activation, y)
    return _product(y, weight, residual_, skip, branch)


def _linear_on_cpu(
    x: Tensor | None,
    weight: DecodeWeight,
    norm: InputNorm,
    gate: Tensor | None,
    activation: str,
    residual_: Tensor | None,
    skip: float,
    branch: float,
) -> Tensor:
    rows_in = x if x is not None else gate
    assert rows_in is not None
    y = None if x is None else norm(x)
    if gate is not None:
        opened = ACTIVATIONS[activation](gate)
        y = opened if y is None else y * opened
    assert y is not None
    return _product(y if y.dtype == rows_in.dtype else y.to(rows_in.dtype), weight, residual_, skip, branch)


def _product(y: Tensor, weight: DecodeWeight, residual_: Tensor | None, skip: float, branch: float) -> Tensor:
    if residual_ is not None and device.uses_kernels(y) and weight.bias is None and weight.scale is None:
        return residual_.addmm_(y, weight.values.t(), beta=skip, alpha=branch)
    out = _by_library(y, weight) if device.uses_kernels(y) else _in_blocks(y, weight)
    if weight.bias is not None:
        out = out + weight.bias
    if residual_ is None:
        return out
    if skip != 1.0:
        residual_.mul_(skip)
    return residual_.add_(out, alpha=branch)


def _by_library(y: Tensor, weight: DecodeWeight) -> Tensor:
    if weight.scale is None:
        return y @ weight.values.t()
    return (y @ weight.values.to(y.dtype).t()) * weight.scale.to(y.dtype)


def _in_blocks(y: Tensor, weight: DecodeWeight) -> Tensor:
    """y W^T on a CPU with W in blocks, whose products run side by side on all cores."""
    if weight.scale is not None:
        # bfloat16 inputs and sums: torch's kernel for other dtypes is slower than reading the weights in float32.
        out = torch._weight_int8pack_mm(y.bfloat16(), weight.values, weight.ones)
        return (out * weight.scale).to(y.dtype)
    B = y.shape[0]  # (len of a tensor takes microseconds)
    if B > BLOCK_PRODUCT_ROWS:
        return y @ weight.values.t()
    blocks = weight.blocks
    rows = y.expand(blocks.shape[0], -1, -1)
    if (
        B == 1 and y.dtype == torch.float32
    ):  # W y^T is up to twice as fast as y W^T, whose terms MKL adds in other order
        return torch.bmm(blocks, rows.mT).view(1, -1)
    out = torch.bmm(rows, blocks.mT)
    return out.view(1, -1) if B == 1 else out.transpose(0, 1).reshape(B, -1)


def _nones(x: Tensor) -> list[None]:
    return [None] * len(x.split(MATVEC_ROWS))
