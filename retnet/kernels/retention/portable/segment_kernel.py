"""The segment kernel: the tokens of a segment read its border state and one another.

    forward:   out_i = a enter_i x_i S + b sum_{j <= i} between(i, j) (x_i . y_j) z_j
    reversed:  out_j = a leave_j x_j S + b sum_{i >= j} between(i, j) (x_j . y_i) z_i

The adjoint of retention is retention, so these two make the output and three gradients (S, dS: the border states):

    out = forward(q, k, v, S)          dv = reversed(k, q, dout, dS)
    dq  = forward(dout, v, k, S^T)     dk = reversed(v, dout, q, dS^T)

A program makes a tile of BM rows (tokens) x BO columns of one head; for dq and dk, of one group, whose heads it sums in
order. It visits the segment's tokens BN at a time. The contraction over x's columns runs whole where a row of x fits
(BR covers it), else in slices of BR, which the state and the first BN tokens share. All sums are float32. Heads that
share queries and keys have kernels of their own where rows are short enough (`shared_heads_kernel`).
"""

import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.architectures import architecture
from retnet.kernels.recording import launch
from retnet.kernels.retention.portable.segment_decay import (
    between,
    between_all,
    decay_of_head,
    enter,
    leave,
    running,
)
from retnet.kernels.retention.portable.segment_read import SegmentRead, load_state, store_tile
from retnet.kernels.retention.portable.shared_heads_kernel import read_shared_segments
from retnet.kernels.retention.tile_shapes import SegmentTile
from retnet.kernels.retention.tiles import shared_tile
from retnet.kernels.segments import head_pointer, load_tile, segment_bounds, state_of, tokens_ok


def read_segments(read: SegmentRead, tile: SegmentTile) -> tuple[Tensor, Tensor | None]:
    """out [tokens, ., O], and its inner products with `dot_with` [column tiles, H, tokens] if that is given."""
    H, L, slots = read.states.shape[1], read.segments.length, read.segments.num_slots
    groups, out_heads = read.x.shape[1], read.z.shape[1]
    if min(groups, out_heads) < H and slots > 0:
        shared = shared_tile(architecture(read.z.device), read.states.dtype, *read.states.shape[2:], L)
        if shared is not None:
            return read_shared_segments(read, shared)
    column_tiles = triton.cdiv(read.z.shape[2], tile.BO)
    out, dots = read.outputs(column_tiles)
    if slots == 0:
        return out, dots
    BM, partner = min(tile.BM, L), read.partner
    launch(
        _segment_kernel,
        (slots * out_heads * (L // BM) * column_tiles,),
        *read.tensors,
        out,
        partner,
        dots,
        *read.tokens,
        *read.strides,
        partner.stride(0),
        partner.stride(1),
        read.state_scale,
        read.pair_scale,
        **read.constants,
        OUT_HEADS=out_heads,
        HEADS_PER_GROUP=H // (out_heads if read.sum_heads else groups),
        SUM_HEADS=read.sum_heads,
        BM=BM,
        BN=min(tile.BN, BM),
        BR=tile.BR,
        BS=tile.BS,
        BO=tile.BO,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, dots


@triton.jit(do_not_specialize=["T", "num_tokens"])
def _segment_kernel(
    x, y, z, states, out, partner, dots,
    rate, sums, mask, table, T, num_tokens,
    x_token, x_head, y_token, y_head, z_token, z_head, partner_token, partner_head,
    state_scale, pair_scale,
    H: tl.constexpr, OUT_HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr,
    R: tl.constexpr, O: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BO: tl.constexpr,
    REVERSE: tl.constexpr, SUM_HEADS: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    COLUMN_TILES: tl.constexpr = (O + BO - 1) // BO
    pid = tl.program_id(0)
    column_tile = pid % COLUMN_TILES
    pid = pid // COLUMN_TILES
    row0 = pid % (L // BM) * BM
    pid = pid // (L // BM)
    out_head = pid % OUT_HEADS
    slot = pid // OUT_HEADS
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    if row0 >= length:
        return
    rows = row0 + tl.arange(0, BM)
    columns = column_tile * BO + tl.arange(0, BO)
    ok = tokens_ok(mask, start, rows, length, MASKED)

    HEADS: tl.constexpr = HEADS_PER_GROUP if SUM_HEADS else 1
    total = tl.zeros([BM, BO], dtype=tl.float32)
    for i in range(HEADS):
        if SUM_HEADS:
            h, xy_head = out_head * HEADS_PER_GROUP + i, out_head * HEADS_PER_GROUP + i
        else:
            h, xy_head = out_head, out_head // HEADS_PER_GROUP
        product = _one_head(
            head_pointer(x, start, xy_head, x_token, x_head),
            head_pointer(y, start, xy_head, y_token, y_head),
            head_pointer(z, start, out_head, z_token, z_head),
            state_of(states, slot, h, H, R * O),
            decay_of_head(rate, sums, num_tokens, h, start, H, PER_TOKEN, MASKED),
            (mask, start, length), (row0, rows, ok, columns), (x_token, y_token, z_token), state_scale, pair_scale,
            R, O, BM, BN, BR, BS, BO, REVERSE, SUM_HEADS, PER_TOKEN, MASKED, PRECISION,
        )  # fmt: skip
        if dots is not None:
            at = head_pointer(partner, start, out_head, partner_token, partner_head)
            other = load_tile(at, rows, columns, partner_token, ok, O, BO).to(tl.float32)
            at = dots + (column_tile * H + h) * num_tokens.to(tl.int64) + start + rows
            tl.store(at, tl.sum(product * other, 1), mask=rows < length)
        if HEADS == 1:
            total = product
        else:
            total += product
    store_tile(out, start, rows, length, out_head, OUT_HEADS, columns, total, O)


@triton.jit
def _one_head(
    x, y, z, state, decay, tokens, tile, strides, state_scale, pair_scale,
    R: tl.constexpr, O: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BO: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's BM x BO tile in float32. The pointers are those of the segment's first token and of the head.

    decay: from `decay_of_head`; tokens: (mask, start, length); tile: (row0, rows, rows ok, columns).
    """
    log_decay, sums, plane = decay
    mask, start, length = tokens
    row0, rows, ok, columns = tile
    x_token, y_token, z_token = strides
    row_sums = running(sums, plane, rows, length, PER_TOKEN, MASKED)
    if REVERSE:
        reach = leave(log_decay, sums, plane, rows, length, PER_TOKEN, MASKED) * state_scale
        first, last, pivot = row0, length, tl.minimum(row0 + BM, length) - 1
    else:
        reach = enter(log_decay, sums, plane, rows, length, PER_TOKEN, MASKED) * state_scale
        first, last, pivot = 0, tl.minimum(length, row0 + BM), row0
    pivot_sums = running(sums, plane, pivot, length, PER_TOKEN, MASKED)
    acc = tl.zeros([BM, BO], dtype=tl.float32)
    pairs = tl.zeros([BM, BN], dtype=tl.float32)

    if BR >= R:
        for r0 in range(0, R, BS):
            r = r0 + tl.arange(0, BS)
            xs = load_tile(x, rows, r, x_token, ok, R, BS)
            acc = _add_state(xs, state, r, columns, acc, R, O, TRANSPOSED, PRECISION)
        acc *= reach[:, None]
        r = tl.arange(0, BR)
        xs = load_tile(x, rows, r, x_token, ok, R, BR)
    else:
        at = first + tl.arange(0, BN)
        at_ok = tokens_ok(mask, start, at, length, MASKED)
        for r0 in range(0, R, BR):
            r = r0 + tl.arange(0, BR)
            xs = load_tile(x, rows, r, x_token, ok, R, BR)
            ys = load_tile(y, at, r, y_token, at_ok, R, BR)
            pairs = tl.dot(xs, tl.trans(ys), pairs, input_precision=PRECISION)
            acc = _add_state(xs, state, r, columns, acc, R, O, TRANSPOSED, PRECISION)
        acc *= reach[:, None]
        acc = _add_pairs(
            acc, pairs * pair_scale, z, decay, (row0, rows, row_sums, pivot_sums), (first, at, at_ok, length), columns,
            z_token, O, BM, BN, BO, REVERSE, PER_TOKEN, MASKED, PRECISION,
        )  # fmt: skip
        first += BN

    for c0 in range(first, last, BN):
        at = c0 + tl.arange(0, BN)
        at_ok = tokens_ok(mask, start, at, length, MASKED)
        if BR >= R:
            ys = load_tile(y, at, r, y_token, at_ok, R, BR)
            pairs = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
        else:
            pairs = tl.zeros([BM, BN], dtype=tl.float32)
            for r0 in range(0, R, BR):
                r = r0 + tl.arange(0, BR)
                xs = load_tile(x, rows, r, x_token, ok, R, BR)
                ys = load_tile(y, at, r, y_token, at_ok, R, BR)
                pairs = tl.dot(xs, tl.trans(ys), pairs, input_precision=PRECISION)
        acc = _add_pairs(
            acc, pairs * pair_scale, z, decay, (row0, rows, row_sums, pivot_sums), (c0, at, at_ok, length), columns,
            z_token, O, BM, BN, BO, REVERSE, PER_TOKEN, MASKED, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _add_state(
    xs, state, r, columns, acc, R: tl.constexpr, O: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc + xs S[r, columns]. States wider than x (float16) go through tf32, which has the 10 bits of float16."""
    tile = load_state(state, r, columns, R, O, TRANSPOSED)
    return tl.dot(xs.to(tile.dtype), tile, acc, input_precision=PRECISION)


@triton.jit
def _add_pairs(
    acc, pairs, z, decay, row, column, columns, z_token, O: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (pairs * decay between the tokens of row and column, where causal) z[column tokens]."""
    row0, rows, row_sums, pivot_sums = row
    c0, at, at_ok, length = column
    log_decay, sums, plane = decay
    at_sums = running(sums, plane, at, length, PER_TOKEN, MASKED)
    if REVERSE:
        apart = c0 >= row0 + BM
    else:
        apart = c0 + BN <= row0
    if apart:
        # All tokens of the tile are beyond the pivot: an outer product of decays <= 1.
        near = between(log_decay, row_sums, pivot_sums, REVERSE, PER_TOKEN)
        far = between(log_decay, pivot_sums, at_sums, REVERSE, PER_TOKEN)
        weighted = pairs * (near[:, None] * far[None, :])
    else:
        weights = between_all(log_decay, row_sums, at_sums, REVERSE, PER_TOKEN)
        if REVERSE:
            weights = tl.where(at[None, :] >= rows[:, None], weights, 0.0)
        else:
            weights = tl.where(at[None, :] <= rows[:, None], weights, 0.0)
        weighted = pairs * weights
    zs = load_tile(z, at, columns, z_token, at_ok, O, BO)
    return tl.dot(weighted.to(zs.dtype), zs, acc, input_precision=PRECISION)
