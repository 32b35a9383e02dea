"""The segment kernels for heads that share x and y, or their gradients: Mamba-2, and RetNet with shared q and k.

The formulas are those of `segment_kernel`. What the heads have in common is computed once: out and dv score the pairs
of tokens before they loop over heads; dq and dk sum the decayed scores of all heads before they multiply z. A segment
is one tile of pairs, so a program has to hold a row of x, y and z whole (`shared_tile`).
"""

import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.device import power_of_two
from retnet.kernels.recording import launch
from retnet.kernels.retention.portable.segment_decay import (
    between_all,
    decay_of_head,
    enter,
    leave,
    running,
)
from retnet.kernels.retention.portable.segment_read import SegmentRead, load_state, store_tile
from retnet.kernels.retention.tile_shapes import SharedTile
from retnet.kernels.segments import head_pointer, load_tile, segment_bounds, state_of, tokens_ok


def read_shared_segments(read: SegmentRead, tile: SharedTile) -> tuple[Tensor, Tensor | None]:
    """`segment_kernel.read_segments`, with a single tile of output columns."""
    H, sum_heads, constants = read.states.shape[1], read.sum_heads, read.constants
    out, dots = read.outputs(1)
    heads = H // (read.z if sum_heads else read.x).shape[1]
    if not sum_heads:
        heads = max(n for n in range(1, tile.heads + 1) if heads % n == 0)
    partner = read.partner
    kernel = _sum_kernel if sum_heads else _read_kernel
    launch(
        kernel,
        (read.segments.num_slots * (H // heads),),
        *read.tensors,
        out,
        *((partner, dots) if sum_heads else ()),
        *read.tokens,
        *read.strides,
        *((partner.stride(0), partner.stride(1)) if sum_heads else (H // read.x.shape[1],)),
        read.state_scale,
        read.pair_scale,
        **constants,
        HEADS=heads,
        BR=power_of_two(constants["R"]),
        BO=power_of_two(constants["O"]),
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
def _segment_tokens(slot, mask, table, T, L: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr):
    """The first token of a slot's segment, its number of tokens, all L rows, and which of them hold a real token."""
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    rows = tl.arange(0, L)
    return start, length, rows, tokens_ok(mask, start, rows, length, MASKED)


@triton.jit
def _decays(
    rate, sums, num_tokens, h, start, rows, length, state_scale, H: tl.constexpr,
    REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One head's decays: between every row and the segment's end, scaled, and between all pairs of rows."""
    log_decay, sums, plane = decay_of_head(rate, sums, num_tokens, h, start, H, PER_TOKEN, MASKED)
    if REVERSE:
        reach = leave(log_decay, sums, plane, rows, length, PER_TOKEN, MASKED)
    else:
        reach = enter(log_decay, sums, plane, rows, length, PER_TOKEN, MASKED)
    at = running(sums, plane, rows, length, PER_TOKEN, MASKED)
    return reach * state_scale, between_all(log_decay, at, at, REVERSE, PER_TOKEN)


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
    start, length, rows, ok = _segment_tokens(slot, mask, table, T, L, MASKED, PACKED)
    if length <= 0:
        return
    columns, r = tl.arange(0, BO), tl.arange(0, BR)
    xs = load_tile(head_pointer(x, start, group, x_token, x_head), rows, r, x_token, ok, R, BR)
    ys = load_tile(head_pointer(y, start, group, y_token, y_head), rows, r, y_token, ok, R, BR)
    pairs = _causal(tl.dot(xs, tl.trans(ys), input_precision=PRECISION) * pair_scale, rows, REVERSE)
    for i in range(HEADS):
        h = head0 + i
        reach, apart = _decays(
            rate, sums, num_tokens, h, start, rows, length, state_scale, H, REVERSE, PER_TOKEN, MASKED
        )  # fmt: skip
        weighted = pairs * apart
        state = load_state(state_of(states, slot, h, H, R * O), r, columns, R, O, False)
        zs = load_tile(head_pointer(z, start, h, z_token, z_head), rows, columns, z_token, ok, O, BO)
        acc = tl.dot(xs.to(state.dtype), state, input_precision=PRECISION) * reach[:, None]
        acc = tl.dot(weighted.to(zs.dtype), zs, acc, input_precision=PRECISION)
        store_tile(out, start, rows, length, h, H, columns, acc, O)


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
    start, length, rows, ok = _segment_tokens(slot, mask, table, T, L, MASKED, PACKED)
    if length <= 0:
        return
    columns, r = tl.arange(0, BO), tl.arange(0, BR)
    zs = load_tile(head_pointer(z, start, group, z_token, z_head), rows, columns, z_token, ok, O, BO)
    if dots is not None:
        # The inner product with a head's out, without making that out: scores times the products of partner and z.
        other = load_tile(
            head_pointer(partner, start, group, partner_token, partner_head), rows, columns, partner_token, ok, O, BO
        )  # fmt: skip
        match = tl.dot(other, tl.trans(zs), input_precision=PRECISION) * pair_scale
    scores = tl.zeros([L, L], dtype=tl.float32)
    total = tl.zeros([L, BO], dtype=tl.float32)
    for i in range(HEADS):
        h = group * HEADS + i
        reach, apart = _decays(
            rate, sums, num_tokens, h, start, rows, length, state_scale, H, REVERSE, PER_TOKEN, MASKED
        )  # fmt: skip
        xs = load_tile(head_pointer(x, start, h, x_token, x_head), rows, r, x_token, ok, R, BR)
        ys = load_tile(head_pointer(y, start, h, y_token, y_head), rows, r, y_token, ok, R, BR)
        pairs = _causal(tl.dot(xs, tl.trans(ys), input_precision=PRECISION), rows, REVERSE)
        pairs *= apart
        state = load_state(state_of(states, slot, h, H, R * O), r, columns, R, O, True)
        read = tl.dot(xs.to(state.dtype), state, input_precision=PRECISION) * reach[:, None]
        if dots is not None:
            product = tl.sum(pairs * match, 1) + tl.sum(read * other.to(tl.float32), 1)
            tl.store(dots + h * num_tokens.to(tl.int64) + start + rows, product, mask=rows < length)
        scores += pairs
        total += read
    total = tl.dot((scores * pair_scale).to(zs.dtype), zs, total, input_precision=PRECISION)
    store_tile(out, start, rows, length, group, GROUPS, columns, total, O)
