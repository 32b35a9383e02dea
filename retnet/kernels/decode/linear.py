"""A linear layer of few rows for decoding, with its norm, gate, bias and residual in the same launch.

    out = skip residual + branch (y W^T + bias)        y = norm(x) * act(gate)

A decode step uses every weight for only a few products, so its time is that of reading W and of the launches. A program
owns BN rows of W with all their columns and loads them at once. Where the device allows it, the load starts before the
kernel that makes x has ended (`dependent_launch.py`). Every program normalises the few rows of x itself, which costs
less than a separate launch. Sums are float32 and stay inside a program. Weights may be int8 with one scale per
row, and are read as int8.

With more than a few rows, tensor cores are faster: `prepare` makes y in one launch, and the caller multiplies it by W
with the library's matrix product.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.dependent_launch import await_previous, dependent_launch, start_next

TILE = 16384  # weights that a program loads at once: 128 bytes per thread of 8 warps
PROGRAMS = 512  # about four per processor, so that some load while others sum


class LinearTile(NamedTuple):
    """BN rows of W per program; BG and BV are the groups and the columns per group, rounded up to powers of two."""

    BN: int
    BG: int
    BV: int
    warps: int


def linear_tile(N: int, K: int, groups: int) -> LinearTile:
    """The tile for W [N, K] whose columns are normalised in `groups` groups."""
    BG, BV = triton.next_power_of_2(groups), triton.next_power_of_2(K // groups)
    BN = max(1, TILE // (BG * BV))
    while BN > 1 and N // BN < PROGRAMS:
        BN //= 2
    return LinearTile(BN, BG, BV, 8 if BN * BG * BV >= TILE else 4)


def matvec(
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    norm: tuple[str, int, float, Tensor | None, Tensor | None],
    activation: str,
    out: Tensor,
    residual: Tensor | None,
    skip: float,
    branch: float,
) -> None:
    """x, gate [B, K] (either may be None), weight [N, K], norm (kind, groups, eps, weight, bias) -> out [B, N].

    residual [B, N] may be `out` itself.
    """
    rows_in = x if x is not None else gate
    assert rows_in is not None
    N, K = weight.shape
    kind, groups, eps, norm_weight, norm_bias = norm
    width, tile = K // groups, linear_tile(N, K, groups)
    _matvec_kernel[(triton.cdiv(N, tile.BN),)](
        x, gate, norm_weight, norm_bias, weight, weight_scale, bias, residual, out,
        0 if x is None else x.stride(0), 0 if gate is None else gate.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0), weight.stride(0), eps, skip, branch,
        B=rows_in.shape[0], N=N, G=groups, V=width, BN=tile.BN, BG=tile.BG, BV=tile.BV, NORM=kind, ACT=activation,
        SHARED=norm_weight is not None and norm_weight.numel() == width, num_warps=tile.warps,
        **dependent_launch(weight.device),
    )  # fmt: skip


def prepare(
    x: Tensor | None,
    gate: Tensor | None,
    norm: tuple[str, int, float, Tensor | None, Tensor | None],
    activation: str,
    out: Tensor,
) -> None:
    """y [B, K] = norm(x) * act(gate), written to `out`; arguments as for `matvec`."""
    kind, groups, eps, norm_weight, norm_bias = norm
    B, K = out.shape
    width = K // groups
    _prepare_kernel[(B, groups)](
        x, gate, norm_weight, norm_bias, out,
        0 if x is None else x.stride(0), 0 if gate is None else gate.stride(0), out.stride(0), eps,
        V=width, BV=triton.next_power_of_2(width), NORM=kind, ACT=activation,
        SHARED=norm_weight is not None and norm_weight.numel() == width, num_warps=4,
    )  # fmt: skip


@triton.jit
def _inputs(
    x, gate, norm_weight, norm_bias, cell, column, inside, eps,
    V: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """y at cells [G, V] of one row, float32; 0 outside."""
    y = tl.zeros(cell.shape, tl.float32)
    if x is not None:
        y = tl.load(x + cell, mask=inside, other=0.0).to(tl.float32)
        if NORM == "layer":
            y = tl.where(inside, y - (tl.sum(y, 1) / V)[:, None], 0.0)
        if NORM != "none":
            y = y * (1.0 / tl.sqrt(tl.sum(y * y, 1) / V + eps))[:, None]
            place = column if SHARED else cell
            if norm_weight is not None:
                y = y * tl.load(norm_weight + place, mask=inside, other=0.0).to(tl.float32)
            if norm_bias is not None:
                y = y + tl.load(norm_bias + place, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        z = tl.load(gate + cell, mask=inside, other=0.0).to(tl.float32)
        if ACT == "swish":
            z = z / (1.0 + tl.exp(-z))
        elif ACT == "sigmoid":
            z = 1.0 / (1.0 + tl.exp(-z))
        elif ACT == "gelu":
            z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        elif ACT == "relu":
            z = tl.maximum(z, 0.0)
        if x is not None:
            z = y * z
        y = z
    return y


@triton.jit
def _matvec_kernel(
    x, gate, norm_weight, norm_bias, weight, weight_scale, bias, residual, out,
    x_row, gate_row, residual_row, out_row, weight_row, eps, skip, branch,
    B: tl.constexpr, N: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, SHARED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    start_next(DEPENDENT)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BG * BV)
    if BG * BV == G * V:  # nothing padded, and the compiler sees that columns are contiguous
        W = tl.load(weight + n[:, None].to(tl.int64) * weight_row + k[None, :], mask=(n < N)[:, None], other=0.0)
    else:
        k_ok = (k // BV < G) & (k % BV < V)
        cells = (k // BV) * V + k % BV
        W = tl.load(
            weight + n[:, None].to(tl.int64) * weight_row + cells[None, :],
            mask=(n < N)[:, None] & k_ok[None, :],
            other=0.0,
        )
    await_previous(DEPENDENT)  # the weights are already loading; the inputs come from earlier kernels
    group, column = tl.arange(0, BG), tl.arange(0, BV)
    inside = (group < G)[:, None] & (column < V)[None, :]
    cell = group[:, None] * V + column[None, :]
    column = cell * 0 + column[None, :]
    for b in tl.static_range(B):
        x_b = None if x is None else x + b * x_row
        gate_b = None if gate is None else gate + b * gate_row
        y = _inputs(x_b, gate_b, norm_weight, norm_bias, cell, column, inside, eps, V, NORM, ACT, SHARED)
        total = tl.sum(W.to(tl.float32) * tl.reshape(y, [BG * BV])[None, :], 1)
        if weight_scale is not None:
            total = total * tl.load(weight_scale + n, mask=n < N, other=0.0).to(tl.float32)
        if bias is not None:
            total = total + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if residual is not None:
            before = tl.load(residual + b * residual_row + n, mask=n < N, other=0.0).to(tl.float32)
            total = skip * before + branch * total
        tl.store(out + b * out_row + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _prepare_kernel(
    x, gate, norm_weight, norm_bias, out, x_row, gate_row, out_row, eps,
    V: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BV)[None, :]
    inside = column < V
    cell = g * V + column
    x_b = None if x is None else x + b * x_row
    gate_b = None if gate is None else gate + b * gate_row
    y = _inputs(x_b, gate_b, norm_weight, norm_bias, cell, column, inside, eps, V, NORM, ACT, SHARED)
    tl.store(out + b * out_row + cell, y.to(out.dtype.element_ty), mask=inside)
