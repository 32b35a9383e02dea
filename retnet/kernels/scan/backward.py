"""Mamba's selective scan on a GPU, backward: in reverse over segments, with the states recomputed.

    dh_t = dy_t read_t + exp(step_{t+1} rate) dh_{t+1}
    dread_t = sum_d dy_t h_t        dwrite_t = sum_d step_t x_t dh_t        du_t = sum_n write_t dh_t,  u = step x
    dlog_t = dh_t exp(step_t rate) h_{t-1}
    dx_t = du_t step_t        dstep_t = du_t x_t + sum_n rate dlog_t        drate = sum_t step_t dlog_t

As in the forward, all segments run at once when the dh after each of them is known: dh is joined like the states, in
reverse. A state cannot be recovered from a later one (a decay may be 0), so the states of RUN tokens at a time are
recomputed from their segment's start into registers. Sums over channels are written per block of channels, sums of the
rates over tokens per segment, and torch adds them up in a fixed order: no atomics.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch
from retnet.kernels.scan.chain import chain_segments
from retnet.kernels.scan.inputs import Scan, load_rates, load_row, next_state, tile
from retnet.kernels.segments import segment_bounds

RUN = 8  # tokens whose states are in registers at a time


def scan_backward(
    scan: Scan, starts: Tensor, dy: Tensor, dfinal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dstep, drate, dwrite, dread, dstate [S, D, N]); starts as `scan_forward` made them. drate is float32."""
    segments, device = scan.segments, scan.x.device
    B, T, D = scan.x.shape
    dy = dy.contiguous()
    after, sums = scan.per_slot(scan.N, D), scan.per_slot(D)
    dstate = torch.empty(segments.num_sequences, D, scan.N, dtype=torch.float32, device=device)
    dx, dstep = (torch.empty(z.shape, dtype=z.dtype, device=device) for z in (scan.x, scan.step))
    narrow = replace(scan, BD=max(1, scan.BD // 2))  # the states of a run take registers too
    by_block = torch.empty(2, narrow.blocks, B * T, scan.N, dtype=torch.float32, device=device)
    drate = scan.per_slot(scan.N, D)
    if segments.num_slots:
        launch(
            _segment_adjoints, (segments.num_slots * scan.blocks,),
            dy, scan.step, scan.rate, scan.read, after, sums, segments.table, segments.tokens_per_sequence,
            scan.step.stride(1), scan.read.stride(1), **scan.shapes, num_warps=1,
        )  # fmt: skip
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    chain_segments(scan, after, sums, dfinal, dstate, reverse=True)
    if segments.num_slots:
        launch(
            _gradients, (segments.num_slots * narrow.blocks,),
            scan.x, scan.step, scan.rate, scan.write, scan.read, dy, starts, after, dx, dstep, by_block[0],
            by_block[1], drate, segments.table, segments.tokens_per_sequence, B * T,
            scan.x.stride(1), scan.step.stride(1), scan.write.stride(1), scan.read.stride(1),
            **narrow.shapes, R=RUN, num_warps=1,
        )  # fmt: skip
    dwrite, dread = (part.sum(0).view(B, T, scan.N).to(scan.write.dtype) for part in by_block)
    return dx, dstep, drate.sum(0).T.contiguous(), dwrite, dread.to(scan.read.dtype), dstate


@triton.jit(do_not_specialize=["T", "step_stride", "read_stride"])
def _segment_adjoints(
    dy, step, rate, read, local, sums, table, T, step_stride, read_stride,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The contribution of a segment's tokens to the gradient of the state before it, and the sum of their steps."""
    slot, n, d, ok, cell = tile(D, N, BN, BD)
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    rates = load_rates(rate, n, d, ok, N)
    carried = tl.zeros([BN, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    for i in tl.range(0, length, loop_unroll_factor=4):
        t = start + length - 1 - i
        dt = load_row(step, t, step_stride, d, d < D)
        dout = load_row(dy, t, D, d, d < D)
        r = load_row(read, t, read_stride, n, n < N)
        carried = tl.exp(dt[None, :] * rates) * (carried + dout[None, :] * r[:, None])
        total += dt
    tl.store(local + slot.to(tl.int64) * N * D + cell, carried, mask=ok)
    tl.store(sums + slot.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["T", "tokens", "x_stride", "step_stride", "write_stride", "read_stride"])
def _gradients(
    x, step, rate, write, read, dy, starts, after, dx, dstep, dwrite, dread, drate, table, T, tokens,
    x_stride, step_stride, write_stride, read_stride,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    slot, n, d, ok, cell = tile(D, N, BN, BD)
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    place = slot.to(tl.int64) * N * D + cell
    partial = (tl.program_id(0) % BLOCKS).to(tl.int64) * tokens * N
    rates = load_rates(rate, n, d, ok, N)
    carried = tl.load(after + place, mask=ok, other=0.0)
    total = tl.zeros([BN, BD], tl.float32)
    runs = (length + R - 1) // R
    for i in range(runs):
        first = (runs - 1 - i) * R
        h = tl.load(starts + place, mask=ok, other=0.0)
        for t in range(first):
            h = _next(h, x, step, write, rates, start + t, x_stride, step_stride, write_stride, n, d, d < D, n < N)
        # Tokens past the end load as 0: they neither decay nor write, and nothing of theirs is stored.
        states = (h,)
        for j in tl.static_range(R - 1):
            there = first + j < length
            h = _next(
                h, x, step, write, rates, start + first + j, x_stride, step_stride, write_stride, n, d,
                tl.where(there, d, D) < D, tl.where(there, n, N) < N,
            )  # fmt: skip
            states = states + (h,)
        for back in tl.static_range(1, R + 1):
            t = start + first + R - back
            there = first + R - back < length
            d_ok, n_ok = tl.where(there, d, D) < D, tl.where(there, n, N) < N
            before = states[R - back]
            dt = load_row(step, t, step_stride, d, d_ok)
            xt = load_row(x, t, x_stride, d, d_ok)
            w = load_row(write, t, write_stride, n, n_ok)
            r = load_row(read, t, read_stride, n, n_ok)
            dout = load_row(dy, t, D, d, d_ok)
            decayed = tl.exp(dt[None, :] * rates) * before
            new = decayed + (dt * xt)[None, :] * w[:, None]
            dh = carried + dout[None, :] * r[:, None]
            tl.store(dread + partial + t * N + n, tl.sum(new * dout[None, :], 1), mask=n_ok)
            tl.store(dwrite + partial + t * N + n, tl.sum(dh * (dt * xt)[None, :], 1), mask=n_ok)
            du = tl.sum(dh * w[:, None], 0)
            dlog = dh * decayed
            total += dlog * dt[None, :]
            given = du * xt + tl.sum(dlog * rates, 0)
            tl.store(dx + t * D + d, (du * dt).to(dx.dtype.element_ty), mask=d_ok)
            tl.store(dstep + t * D + d, given.to(dstep.dtype.element_ty), mask=d_ok)
            carried = tl.exp(dt[None, :] * rates) * dh
    tl.store(drate + place, total, mask=ok)


@triton.jit
def _next(h, x, step, write, rates, t, x_stride, step_stride, write_stride, n, d, d_ok, n_ok):
    """The state after token t."""
    dt = load_row(step, t, step_stride, d, d_ok)
    u = dt * load_row(x, t, x_stride, d, d_ok)
    w = load_row(write, t, write_stride, n, n_ok)
    return next_state(h, dt, u, w, rates)
