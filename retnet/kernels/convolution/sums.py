"""Gradients of the weight and the bias from their sums over each segment, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch

COLUMNS = 32  # channels per program
SLOTS = 64  # segments that it adds at once


def add_up(sums: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    """sums [slots, W + 1, C] float32 over the slots into dweight [C, 1, W] and dbias [C]."""
    num_slots, rows, C = sums.shape
    grid = rows * triton.cdiv(C, COLUMNS)
    if grid:
        constants = {"C": C, "W": rows - 1, "COLUMNS": COLUMNS, "SLOTS": SLOTS}
        launch(_sums_kernel, (grid,), sums, dweight, dbias, num_slots, **constants, num_warps=4)


@triton.jit(do_not_specialize=["num_slots"])
def _sums_kernel(
    sums, dweight, dbias, num_slots, C: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr
):
    """One tap (the last one is the bias) of a block of channels."""
    tap = tl.program_id(0) % (W + 1)
    channel = tl.program_id(0) // (W + 1) * COLUMNS + tl.arange(0, COLUMNS)
    channel_ok = channel < C
    sums += tap * C + channel[None, :]
    total = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for slot0 in range(0, num_slots, SLOTS):
        slot = slot0 + tl.arange(0, SLOTS)
        at = sums + slot.to(tl.int64)[:, None] * ((W + 1) * C)
        total += tl.load(at, mask=(slot < num_slots)[:, None] & channel_ok[None, :], other=0.0)
    value = tl.sum(total, 0)
    if tap < W:
        tl.store(dweight + channel * W + tap, value.to(dweight.dtype.element_ty), mask=channel_ok)
    else:
        tl.store(dbias + channel, value.to(dbias.dtype.element_ty), mask=channel_ok)
