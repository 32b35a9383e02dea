"""Mamba's selective scan on a GPU, forward: a decay for every channel and state, so no matrix products.

    h_t = exp(step_t rate) h_{t-1} + (step_t x_t) write_t        y_t = sum_n h_t[n] read_t[n]

Tokens are read one after another, but in segments side by side: (1) what each segment adds to the state, from zero;
(2) the segments' states joined in order, since a segment decays what came before by exp(rate sum step); (3) every
segment again from its true state, with outputs. That is twice the arithmetic and T / 32 times the programs. A
program owns a [states, channels] tile of registers, all states of a channel in one thread where they fit, so the sum
over n needs few shuffles. Everything is float32 and summed in one order. Left out: z gate and skip (torch fuses them).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.chain import chain_states
from retnet.kernels.segments import Segments, segment_bounds, sequence_bounds

TILE = 512  # numbers of state a program (a warp) holds


@dataclass(frozen=True)
class Scan:
    """One call's inputs as kernels read them: rows of D channels or N states, a stride apart, token after token."""

    x: Tensor
    step: Tensor
    rate: Tensor
    write: Tensor
    read: Tensor
    state: Tensor | None
    segments: Segments
    N: int
    BN: int
    BD: int

    @classmethod
    def of(
        cls,
        x: Tensor,
        step: Tensor,
        rate: Tensor,
        write: Tensor,
        read: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        segment: int,
    ) -> "Scan":
        """segment: tokens; the states [N, D] before each are kept for the backward, which wants a multiple of RUN."""
        B, T, D = x.shape
        N = rate.shape[1]
        BN = triton.next_power_of_2(N)
        BD = min(max(1, TILE // BN), triton.next_power_of_2(D))
        state = None if state is None else state.float().contiguous()
        return cls(
            *(_rows(z) for z in (x, step)),
            rate.float().contiguous(),
            *(_rows(z) for z in (write, read)),
            state,
            Segments.of(B, T, segment, cu_seqlens),
            N,
            BN,
            BD,
        )

    @property
    def D(self) -> int:
        return self.x.shape[2]

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.D, self.BD)

    @property
    def shapes(self) -> dict[str, int | bool]:
        """Constants of every kernel."""
        return {
            "D": self.D,
            "N": self.N,
            "BN": self.BN,
            "BD": self.BD,
            "L": self.segments.length,
            "PACKED": self.segments.packed,
        }

    def per_slot(self, *shape: int) -> Tensor:
        """Float32 for every segment."""
        return torch.empty(self.segments.num_slots, *shape, dtype=torch.float32, device=self.x.device)


def _rows(z: Tensor) -> Tensor:
    """[B, T, W] whose tokens are one stride apart through the whole batch (a part of a wider tensor will do)."""
    return z if z.stride(2) == 1 and (z.shape[0] == 1 or z.stride(0) == z.shape[1] * z.stride(1)) else z.contiguous()


def scan_forward(scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D] in x's dtype, the last state [S, D, N], and the state [slots, N, D] before each segment."""
    segments = scan.segments
    starts, sums = scan.per_slot(scan.N, scan.D), scan.per_slot(scan.D)
    y = torch.empty(scan.x.shape, dtype=scan.x.dtype, device=scan.x.device)
    final = torch.empty(segments.num_sequences, scan.D, scan.N, dtype=torch.float32, device=scan.x.device)
    if segments.num_slots:
        _segment_states[(segments.num_slots * scan.blocks,)](
            scan.x, scan.step, scan.rate, scan.write, starts, sums, segments.table, segments.tokens_per_sequence,
            scan.x.stride(1), scan.step.stride(1), scan.write.stride(1), **scan.shapes, num_warps=1,
        )  # fmt: skip
    chain_segments(scan, starts, sums, scan.state, final, reverse=False)
    if segments.num_slots:
        _outputs[(segments.num_slots * scan.blocks,)](
            scan.x, scan.step, scan.rate, scan.write, scan.read, starts, y,
            segments.table, segments.tokens_per_sequence,
            scan.x.stride(1), scan.step.stride(1), scan.write.stride(1), scan.read.stride(1),
            **scan.shapes, num_warps=1,
        )  # fmt: skip
    return y, final, starts


def chain_segments(
    scan: Scan, local: Tensor, sums: Tensor, first: Tensor | None, last: Tensor, *, reverse: bool
) -> None:
    """Turn what each segment adds, `local` [slots, N, D], into what stands before it (after it, if reversed), in place.

    sums [slots, D] are those of the steps; first and last [S, D, N]: before and after the whole sequence.
    """
    segments = scan.segments
    if segments.num_sequences == 0:
        return
    _chain_kernel[(segments.num_sequences * scan.blocks,)](
        local, sums, scan.rate, first, last, segments.cu_seqlens, segments.first_slot, segments.tokens_per_sequence,
        **scan.shapes, REVERSE=reverse, num_warps=1,
    )  # fmt: skip


@triton.jit
def tile(D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """(program's slot or sequence, states, channels, which of them are there, their place in [N, D])."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    n = tl.arange(0, BN)
    d = pid % BLOCKS * BD + tl.arange(0, BD)
    ok = (n < N)[:, None] & (d < D)[None, :]
    return pid // BLOCKS, n, d, ok, n[:, None] * D + d[None, :]


@triton.jit
def load_row(pointer, token, stride, columns, ok):
    """One token's values, float32."""
    return tl.load(pointer + token * stride + columns, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "x_stride", "step_stride", "write_stride"])
def _segment_states(
    x, step, rate, write, local, sums, table, T, x_stride, step_stride, write_stride,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    slot, n, d, ok, cell = tile(D, N, BN, BD)
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    rates = tl.load(rate + d[None, :] * N + n[:, None], mask=ok, other=0.0)
    h = tl.zeros([BN, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    for t in tl.range(0, length, loop_unroll_factor=4):
        dt = load_row(step, start + t, step_stride, d, d < D)
        u = dt * load_row(x, start + t, x_stride, d, d < D)
        w = load_row(write, start + t, write_stride, n, n < N)
        h = tl.exp(dt[None, :] * rates) * h + u[None, :] * w[:, None]
        total += dt
    tl.store(local + slot.to(tl.int64) * N * D + cell, h, mask=ok)
    tl.store(sums + slot.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["T"])
def _chain_kernel(
    local, sums, rate, first, last, cu_seqlens, first_slot, T,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    sequence, n, d, ok, cell = tile(D, N, BN, BD)
    _, _, slot, count = sequence_bounds(sequence, cu_seqlens, first_slot, T, L, PACKED)
    turned = sequence.to(tl.int64) * D * N + d[None, :] * N + n[:, None]
    rates = tl.load(rate + d[None, :] * N + n[:, None], mask=ok, other=0.0)
    h = tl.zeros([BN, BD], tl.float32)
    if first is not None:
        h = tl.load(first + turned, mask=ok, other=0.0)
    h = chain_states(
        h, local + _nth(slot, 0, count, REVERSE) * N * D, cell, ok, -N * D if REVERSE else N * D, count, count,
        _steps, (sums, slot, count, d, D, REVERSE), _keep, (rates,),
    )  # fmt: skip
    tl.store(last + turned, h, mask=ok)


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


@triton.jit(do_not_specialize=["T", "x_stride", "step_stride", "write_stride", "read_stride"])
def _outputs(
    x, step, rate, write, read, starts, y, table, T, x_stride, step_stride, write_stride, read_stride,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    slot, n, d, ok, cell = tile(D, N, BN, BD)
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    rates = tl.load(rate + d[None, :] * N + n[:, None], mask=ok, other=0.0)
    h = tl.load(starts + slot.to(tl.int64) * N * D + cell, mask=ok, other=0.0)
    for t in tl.range(0, length, loop_unroll_factor=4):
        dt = load_row(step, start + t, step_stride, d, d < D)
        u = dt * load_row(x, start + t, x_stride, d, d < D)
        w = load_row(write, start + t, write_stride, n, n < N)
        r = load_row(read, start + t, read_stride, n, n < N)
        h = tl.exp(dt[None, :] * rates) * h + u[None, :] * w[:, None]
        out = tl.sum(h * r[:, None], 0)
        tl.store(y + (start + t) * D + d, out.to(y.dtype.element_ty), mask=d < D)
