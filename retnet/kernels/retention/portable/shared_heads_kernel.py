"""The segment kernel where several heads share x and y, or their gradients: Mamba-2, and RetNet with shared q and k.

The formulas are those of `segment`. What its heads have in common is made once: out and dv score a segment's pairs of
tokens before they loop over heads, dq and dk sum the decayed scores of all heads before they meet z. A segment is one
tile of pairs, so a row of x, y and z has to fit a program whole (`shared_tile`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.device import power_of_two, precision
from retnet.kernels.retention.portable.segment_decay import (
    SegmentDecay,
    between_all,
    decay_of_head,
    enter,
    leave,
    running,
)
from retnet.kernels.retention.tiles import SharedTile
from retnet.kernels.segments import Segments, head_pointer, load_tile, segment_bounds, state_of, tokens_ok


def read_shared_segments(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    states: Tensor,
    decay: SegmentDecay,
    segments: Segments,
    tile: SharedTile,
    *,
    state_scale: float,
    pair_scale: float,
    reverse: bool,
    sum_heads: bool,
    row_dot_with: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`segment.read_segments`, with a single tile of output columns."""
    H, R, O = states.shape[1], x.shape[-1], z.shape[-1]
    out = torch.empty(segments.num_tokens, z.shape[1], O, dtype=z.dtype, device=z.device)
    dots = None
    if row_dot_with is not None:
        dots = torch.empty(1, H, segments.num_tokens, dtype=torch.float32, device=z.device)
    heads = H // (z if sum_heads else x).shape[1]
    if not sum_heads:
        heads = max(n for n in range(1, tile.heads + 1) if heads % n == 0)
    partner = z if row_dot_with is None else row_dot_with
    kernel = _sum_kernel if sum_heads else _read_kernel
    kernel[(segments.num_slots * (H // heads),)](
        x,
        y,
        z,
        states,
        out,
        *((partner, dots) if sum_heads else ()),
        decay.rate,
        decay.sums,
        decay.mask,
        segments.table,
        segments.tokens_per_sequence,
        segments.num_tokens,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        z.stride(0),
        z.stride(1),
        *((partner.stride(0), partner.stride(1)) if sum_heads else (H // x.shape[1],)),
        state_scale,
        pair_scale,
        H=H,
        HEADS=heads,
        R=R,
        O=O,
        L=segments.length,
        BR=power_of_two(R),
        BO=power_of_two(O),
        REVERSE=reverse,
        PER_TOKEN=decay.per_token,
        MASKED=decay.mask is not None,
        PACKED=segments.packed,
        PRECISION=precision(z.dtype),
        num_warps=tile.sum_warps if sum_heads else tile.warps,
        num_stages=tile.stages,
    )
    return out, dots


@triton.jit
def _causal(pairs, rows, REVERSE: tl.constexpr):
    if REVERSE:
        return tl.where(rows[None, :] >= rows[:, None], pairs, 0.0)
    return tl.where(rows[None, :] <= rows[:, None], pairs, 0.0)


@triton.jit
def _decays(
    rate, sums, num_tokens, h, start, rows, length, H: tl.constexpr,
    REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One head's decays: between every row and the segment's border, and between all pairs of rows."""
    log_decay, sums, plane = decay_of_head(rate, sums, num_tokens, h, start, H, PER_TOKEN, MASKED)
    if REVERSE:
        reach = leave(log_decay, sums, plane, rows, length, PER_TOKEN, MASKED)
    else:
        reach = enter(log_decay, sums, plane, rows, length, PER_TOKEN, MASKED)
    at = running(sums, plane, rows, length, PER_TOKEN, MASKED)
    return reach, between_all(log_decay, at, at, REVERSE, PER_TOKEN)


@triton.jit(do_not_specialize=["T", "num_tokens"])
def _read_kernel(
    x, y, z, states, out,
    rate, sums, mask, table, T, num_tokens,
    x_token, x_head, y_token, y_head, z_token, z_head, heads_per_group,
    state_scale, pair_scale,
    H: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, O: tl.constexpr, L: tl.constexpr,
    BR: tl.constexpr, BO: tl.constexpr,
    REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and dv of HEADS heads of one group. Grid: slots H / HEADS."""
    head0 = tl.program_id(0) % (H // HEADS) * HEADS
    slot = tl.program_id(0) // (H // HEADS)
    group = head0 // heads_per_group
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    if length <= 0:
        return
    rows, columns, r = tl.arange(0, L), tl.arange(0, BO), tl.arange(0, BR)
    ok = tokens_ok(mask, start, rows, length, MASKED)
    xs = load_tile(head_pointer(x, start, group, x_token, x_head), rows, r, x_token, ok, R, BR)
    ys = load_tile(head_pointer(y, start, group, y_token, y_head), rows, r, y_token, ok, R, BR)
    pairs = _causal(tl.dot(xs, tl.trans(ys), input_precision=PRECISION) * pair_scale, rows, REVERSE)
    for i in range(HEADS):
        h = head0 + i
        reach, apart = _decays(
            rate, sums, num_tokens, h, start, rows, length, H, REVERSE, PER_TOKEN, MASKED
        )  # fmt: skip
        reach *= state_scale
        weighted = pairs * apart
        cells = state_of(states, slot, h, H, R * O) + r[:, None] * O + columns[None, :]
        state = tl.load(cells, mask=(r < R)[:, None] & (columns < O)[None, :], other=0.0)
        zs = load_tile(head_pointer(z, start, h, z_token, z_head), rows, columns, z_token, ok, O, BO)
        acc = tl.dot(xs.to(state.dtype), state, input_precision=PRECISION) * reach[:, None]
        acc = tl.dot(weighted.to(zs.dtype), zs, acc, input_precision=PRECISION)
        to = out + (start + rows)[:, None] * (H * O) + h * O + columns[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=(rows < length)[:, None] & (columns < O)[None, :])


@triton.jit(do_not_specialize=["T", "num_tokens"])
def _sum_kernel(
    x, y, z, states, out, partner, dots,
    rate, sums, mask, table, T, num_tokens,
    x_token, x_head, y_token, y_head, z_token, z_head, partner_token, partner_head,
    state_scale, pair_scale,
    H: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, O: tl.constexpr, L: tl.constexpr,
    BR: tl.constexpr, BO: tl.constexpr,
    REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk of one group, over its HEADS heads. Grid: slots H / HEADS."""
    GROUPS: tl.constexpr = H // HEADS
    group = tl.program_id(0) % GROUPS
    slot = tl.program_id(0) // GROUPS
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    if length <= 0:
        return
    rows, columns, r = tl.arange(0, L), tl.arange(0, BO), tl.arange(0, BR)
    ok = tokens_ok(mask, start, rows, length, MASKED)
    zs = load_tile(head_pointer(z, start, group, z_token, z_head), rows, columns, z_token, ok, O, BO)
    if dots is not None:
        # The row product with a head's part of out, without that part: scores of pairs times those of partner and z.
        other = load_tile(
            head_pointer(partner, start, group, partner_token, partner_head), rows, columns, partner_token, ok, O, BO
        )  # fmt: skip
        match = tl.dot(other, tl.trans(zs), input_precision=PRECISION) * pair_scale
    scores = tl.zeros([L, L], dtype=tl.float32)
    total = tl.zeros([L, BO], dtype=tl.float32)
    for i in range(HEADS):
        h = group * HEADS + i
        reach, apart = _decays(
            rate, sums, num_tokens, h, start, rows, length, H, REVERSE, PER_TOKEN, MASKED
        )  # fmt: skip
        reach *= state_scale
        xs = load_tile(head_pointer(x, start, h, x_token, x_head), rows, r, x_token, ok, R, BR)
        ys = load_tile(head_pointer(y, start, h, y_token, y_head), rows, r, y_token, ok, R, BR)
        pairs = _causal(tl.dot(xs, tl.trans(ys), input_precision=PRECISION), rows, REVERSE)
        pairs *= apart
        cells = state_of(states, slot, h, H, R * O) + columns[None, :] * R + r[:, None]
        state = tl.load(cells, mask=(r < R)[:, None] & (columns < O)[None, :], other=0.0)
        read = tl.dot(xs.to(state.dtype), state, input_precision=PRECISION) * reach[:, None]
        if dots is not None:
            product = tl.sum(pairs * match, 1) + tl.sum(read * other.to(tl.float32), 1)
            tl.store(dots + h * num_tokens.to(tl.int64) + start + rows, product, mask=rows < length)
        scores += pairs
        total += read
    total = tl.dot((scores * pair_scale).to(zs.dtype), zs, total, input_precision=PRECISION)
    to = out + (start + rows)[:, None] * (GROUPS * O) + group * O + columns[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(rows < length)[:, None] & (columns < O)[None, :])
