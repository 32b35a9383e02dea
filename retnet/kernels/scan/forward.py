"""Mamba's selective scan on a GPU, forward: a decay for every channel and state, so no matrix products.

    h_t = exp(step_t rate) h_{t-1} + (step_t x_t) write_t        y_t = sum_n h_t[n] read_t[n]

Tokens are read one after another, but all segments at once, in three stages: what each segment adds to the state, from
zero; the segments' states joined in order (`chain.py`); every segment again from its true state, with outputs. That is
twice the arithmetic and T / 32 times the programs. A program owns a [states, channels] tile of registers, all states of
a channel in one thread where they fit, so the sum over n needs few shuffles. Everything is float32 and summed in one
order. Left out: the z gate and the skip (torch fuses them).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch
from retnet.kernels.scan.chain import chain_segments
from retnet.kernels.scan.inputs import Scan, load_rates, load_row, next_state, tile
from retnet.kernels.segments import segment_bounds


def scan_forward(scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D] in x's dtype, the last state [S, D, N], and the state [slots, N, D] before each segment."""
    segments = scan.segments
    starts, sums = scan.per_slot(scan.N, scan.D), scan.per_slot(scan.D)
    y = torch.empty(scan.x.shape, dtype=scan.x.dtype, device=scan.x.device)
    final = torch.empty(segments.num_sequences, scan.D, scan.N, dtype=torch.float32, device=scan.x.device)
    if segments.num_slots:
        launch(
            _segment_states, (segments.num_slots * scan.blocks,),
            scan.x, scan.step, scan.rate, scan.write, starts, sums, segments.table, segments.tokens_per_sequence,
            scan.x.stride(1), scan.step.stride(1), scan.write.stride(1), **scan.shapes, num_warps=1,
        )  # fmt: skip
    chain_segments(scan, starts, sums, scan.state, final, reverse=False)
    if segments.num_slots:
        launch(
            _outputs, (segments.num_slots * scan.blocks,),
            scan.x, scan.step, scan.rate, scan.write, scan.read, starts, y,
            segments.table, segments.tokens_per_sequence,
            scan.x.stride(1), scan.step.stride(1), scan.write.stride(1), scan.read.stride(1),
            **scan.shapes, num_warps=1,
        )  # fmt: skip
    return y, final, starts


@triton.jit(do_not_specialize=["T", "x_stride", "step_stride", "write_stride"])
def _segment_states(
    x, step, rate, write, local, sums, table, T, x_stride, step_stride, write_stride,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The contribution of a segment's tokens to the state, and the sum of their steps."""
    slot, n, d, ok, cell = tile(D, N, BN, BD)
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    rates = load_rates(rate, n, d, ok, N)
    h = tl.zeros([BN, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    for t in tl.range(0, length, loop_unroll_factor=4):
        dt = load_row(step, start + t, step_stride, d, d < D)
        u = dt * load_row(x, start + t, x_stride, d, d < D)
        w = load_row(write, start + t, write_stride, n, n < N)
        h = next_state(h, dt, u, w, rates)
        total += dt
    tl.store(local + slot.to(tl.int64) * N * D + cell, h, mask=ok)
    tl.store(sums + slot.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["T", "x_stride", "step_stride", "write_stride", "read_stride"])
def _outputs(
    x, step, rate, write, read, starts, y, table, T, x_stride, step_stride, write_stride, read_stride,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The outputs of a segment from the state before it."""
    slot, n, d, ok, cell = tile(D, N, BN, BD)
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    rates = load_rates(rate, n, d, ok, N)
    h = tl.load(starts + slot.to(tl.int64) * N * D + cell, mask=ok, other=0.0)
    for t in tl.range(0, length, loop_unroll_factor=4):
        dt = load_row(step, start + t, step_stride, d, d < D)
        u = dt * load_row(x, start + t, x_stride, d, d < D)
        w = load_row(write, start + t, write_stride, n, n < N)
        r = load_row(read, start + t, read_stride, n, n < N)
        h = next_state(h, dt, u, w, rates)
        out = tl.sum(h * r[:, None], 0)
        tl.store(y + (start + t) * D + d, out.to(y.dtype.element_ty), mask=d < D)
