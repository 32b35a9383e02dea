"""The states between the segments of a selective scan, from what each segment adds by itself.

A segment decays the state before it by exp(rate sum step), for every channel and state.
"""

import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.chain import chain_states
from retnet.kernels.recording import launch
from retnet.kernels.scan.inputs import Scan, load_rates, tile
from retnet.kernels.segments import sequence_bounds


def chain_segments(
    scan: Scan, local: Tensor, sums: Tensor, first: Tensor | None, last: Tensor, *, reverse: bool
) -> None:
    """Replace what each segment adds, `local` [slots, N, D], by the state before it (if reversed: after it).

    sums [slots, D]: the sums of the steps. first, last [S, D, N]: the states before and after the whole sequence.
    """
    segments = scan.segments
    if segments.num_sequences == 0:
        return
    launch(
        _chain_kernel, (segments.num_sequences * scan.blocks,),
        local, sums, scan.rate, first, last, segments.cu_seqlens, segments.first_slot, segments.tokens_per_sequence,
        **scan.shapes, REVERSE=reverse, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _chain_kernel(
    local, sums, rate, first, last, cu_seqlens, first_slot, T,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    sequence, n, d, ok, cell = tile(D, N, BN, BD)
    _, _, slot, count = sequence_bounds(sequence, cu_seqlens, first_slot, T, L, PACKED)
    transposed = sequence.to(tl.int64) * D * N + d[None, :] * N + n[:, None]
    rates = load_rates(rate, n, d, ok, N)
    h = tl.zeros([BN, BD], tl.float32)
    if first is not None:
        h = tl.load(first + transposed, mask=ok, other=0.0)
    h = chain_states(
        h, local + _nth(slot, 0, count, REVERSE) * N * D, cell, ok, -N * D if REVERSE else N * D, count, count,
        _steps, (sums, slot, count, d, D, REVERSE), _keep, (rates,),
    )  # fmt: skip
    tl.store(last + transposed, h, mask=ok)


@triton.jit
def _nth(slot, i, count, REVERSE: tl.constexpr):
    """The i-th segment of a sequence, from its start or its end."""
    if REVERSE:
        return (slot + count - 1 - i).to(tl.int64)
    return (slot + i).to(tl.int64)


@triton.jit
def _steps(i, there, sums, slot, count, d, D: tl.constexpr, REVERSE: tl.constexpr):
    """The sum of the steps of the i-th segment, if it is there."""
    return tl.load(sums + _nth(slot, i, count, REVERSE) * D + d, mask=tl.where(there, d, D) < D, other=0.0)


@triton.jit
def _keep(state, steps, rates):
    return tl.exp(steps[None, :] * rates) * state
