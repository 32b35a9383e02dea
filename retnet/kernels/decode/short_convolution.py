"""One token of the causal depthwise convolution in a kernel: output and last inputs overwritten, in one launch.

    y = activation(bias + sum_{i < W - 1} weight_i recent_i + weight_{W - 1} x)        recent <- recent_1, ..., x

A program owns one sequence's block of channels. Everything is read before anything is written, so x becomes y in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.convolution.activation import activated, per_unit
from retnet.kernels.dependent_launch import await_previous, dependent_launch, start_next

CHANNELS = 128  # channels per program, at most: few, so that one sequence occupies many processors


def convolution_step_(
    x: Tensor, weight: Tensor, bias: Tensor | None, recent: Tensor, active: Tensor | None, activation: str
) -> None:
    """x [S, C] and recent [S, W - 1, C] with contiguous channels, both overwritten; weight [C, 1, W], bias [C]."""
    S, C = x.shape
    BC = min(CHANNELS, triton.next_power_of_2(C))
    programs = S * triton.cdiv(C, BC)
    if programs:
        _step_kernel[(programs,)](
            x, weight, bias, recent, None if active is None else active.view(torch.uint8),
            x.stride(0), *recent.stride()[:2], C=C, W=weight.shape[-1], BC=BC, ACTIVATION=activation, num_warps=1,
            **dependent_launch(x.device),
        )  # fmt: skip


@triton.jit
def _step_kernel(
    x, weight, bias, recent, active, x_row, recent_row, recent_tap,
    C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    channel = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    ok = channel < C
    start_next(DEPENDENT)
    total = tl.zeros([BC], tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=ok, other=0.0).to(tl.float32)
    taps = ()
    for i in tl.static_range(W):  # weights are read while the kernels before this one end
        taps = taps + (tl.load(weight + channel * W + i, mask=ok, other=0.0).to(tl.float32),)
    await_previous(DEPENDENT)
    x += row * x_row + channel
    recent += row * recent_row + channel
    given = tl.load(x, mask=ok, other=0.0)
    past = ()
    for i in tl.static_range(W - 1):
        past = past + (tl.load(recent + i * recent_tap, mask=ok, other=0.0),)
        total += taps[i] * past[i].to(tl.float32)
    total += taps[W - 1] * given.to(tl.float32)
    advances = ok
    if active is not None:
        advances = channel < tl.where(tl.load(active + row) != 0, C, 0)
    tl.debug_barrier()  # a load and a store of one row may give its channels to different threads
    tl.store(x, activated(per_unit(total, ACTIVATION), ACTIVATION).to(x.dtype.element_ty), mask=ok)
    for i in tl.static_range(W - 2):
        tl.store(recent + i * recent_tap, past[i + 1], mask=advances)
    tl.store(recent + (W - 2) * recent_tap, given.to(recent.dtype.element_ty), mask=advances)
