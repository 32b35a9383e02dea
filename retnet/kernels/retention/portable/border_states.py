"""The border states: the state before every segment (in reverse, after it), and at the far end of every sequence.

    forward:   S_end  = gamma(segment) S_start + sum_t leave_t  k_t^T v_t          stored: S_start of every segment
    reversed:  dS_start = gamma(segment) dS_end + scale sum_t enter_t q_t^T dout_t  stored: dS_end of every segment

The adjoint of retention is retention in reverse, so one kernel makes both. A program keeps a [BK, BV] tile of one
head's state in float32 registers and passes over its sequence BT tokens at a time. The weight, at most 1, multiplies x,
the operand that the tensor cores take from registers. If there are too few sequences to fill the chip, each is split
into parts that start from zeros and are joined afterwards (`sequence_parts`).

A state is stored per segment (L tokens), not per BT tokens: at K = 256, V = 512 one state per 64 tokens would move more
bytes than q, k, v and out together. Stored states are bfloat16 for bfloat16 inputs, since the next product would round
them anyway, and float32 otherwise, since float16 would overflow at 65504. For float16 inputs they are rounded here to
the 10 bits of tf32: tensor cores would cut off the other bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.decay import decay_parts
from retnet.kernels.device import multiprocessors, precision, stored_dtype
from retnet.kernels.recording import launch
from retnet.kernels.retention.portable.segment_decay import (
    SegmentDecay,
    decay_of_head,
    enter,
    enter_exponent,
    leave,
)
from retnet.kernels.retention.portable.sequence_parts import as_stored, join_parts, part_bounds
from retnet.kernels.retention.tile_shapes import StateTile
from retnet.kernels.segments import Segments, head_pointer, load_tile, sequence_bounds, state_of, tokens_ok

# A sequence is split where all programs together are fewer than this share of the processors. Near 1 it gains little
# and costs the joining: 0.75 is worth a measurement.
SPLIT_BELOW = 1.0
PROGRAMS_PER_PROCESSOR = 4  # for split sequences: programs hide each other's latency
LEAST_SEGMENTS = 8  # per part: with fewer, joining costs more than it saves
MOST_PARTS = 16


def border_states(
    x: Tensor,
    y: Tensor,
    decay: SegmentDecay,
    segments: Segments,
    tile: StateTile,
    *,
    scale: float,
    initial: Tensor | None,
    final_dtype: torch.dtype | None,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """x [tokens, G, K], y [tokens, H, V] -> (states [slots, H, K, V], final [N, H, K, V], or None if not wanted)."""
    G, K = x.shape[1:]
    H, V = y.shape[1:]
    states = torch.empty(segments.num_slots, H, K, V, dtype=stored_dtype(x.dtype), device=x.device)
    final = None
    if final_dtype is not None:
        final = torch.empty(segments.num_sequences, H, K, V, dtype=final_dtype, device=x.device)
    if segments.num_sequences == 0:
        return states, final
    programs = triton.cdiv(K, tile.BK) * triton.cdiv(V, tile.BV) * H * segments.num_sequences
    parts, processors = 1, multiprocessors(x.device)
    if programs < SPLIT_BELOW * processors:
        parts = most_parts(segments.num_tokens, segments.num_sequences, segments.length)
        parts = min(parts, PROGRAMS_PER_PROCESSOR * processors // programs)
    ends = final  # of the parts
    to_tf32 = x.dtype == torch.float16
    if parts > 1:
        ends = torch.empty(segments.num_sequences, parts, H, K, V, dtype=torch.float32, device=x.device)
    launch(
        _border_states_kernel,
        (programs * parts,),
        x,
        y,
        None if initial is None else initial.contiguous(),
        states,
        ends,
        decay.rate,
        decay.sums,
        decay.mask,
        segments.cu_seqlens,
        segments.first_slot,
        segments.tokens_per_sequence,
        segments.num_tokens,
        parts,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        scale,
        H=H,
        HEADS_PER_GROUP=H // G,
        K=K,
        V=V,
        L=segments.length,
        BT=min(tile.BT, segments.length),
        BK=tile.BK,
        BV=tile.BV,
        REVERSE=reverse,
        PER_TOKEN=decay.per_token,
        MASKED=decay.mask is not None,
        PACKED=segments.packed,
        LAST_END=final is not None,
        TO_TF32=to_tf32,
        PRECISION=precision(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        join_parts(states, ends, final, decay, segments, reverse=reverse, to_tf32=to_tf32)
    return states, final


def most_parts(tokens: int, num_sequences: int, segment: int) -> int:
    """The largest number of parts that a sequence of mean length may have."""
    return max(1, min(MOST_PARTS, tokens // max(1, num_sequences) // (LEAST_SEGMENTS * segment)))


@triton.jit(do_not_specialize=["T", "num_tokens", "parts"])
def _border_states_kernel(
    x, y, initial, states, ends,
    rate, sums, mask, cu_seqlens, first_slot, T, num_tokens, parts,
    x_token, x_head, y_token, y_head, scale,
    H: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    LAST_END: tl.constexpr, TO_TF32: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: N parts H, tiles of a state. `ends` [N, parts, H, K, V]; without LAST_END the last part's are not read."""
    STEPS: tl.constexpr = L // BT
    V_TILES: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = V_TILES * ((K + BK - 1) // BK)
    pid = tl.program_id(0)
    h = (pid // TILES) % H
    part = pid // (TILES * H) % parts
    n = pid // (TILES * H * parts)
    k = (pid % TILES) // V_TILES * BK + tl.arange(0, BK)
    v = (pid % TILES) % V_TILES * BV + tl.arange(0, BV)
    in_state = (k < K)[:, None] & (v < V)[None, :]
    cell = k[:, None] * V + v[None, :]

    start, length, slot0, count = sequence_bounds(n, cu_seqlens, first_slot, T, L, PACKED)
    log_decay, sums, plane = decay_of_head(rate, sums, num_tokens, h, start, H, PER_TOKEN, MASKED)
    x = head_pointer(x, start, h // HEADS_PER_GROUP, x_token, x_head)
    y = head_pointer(y, start, h, y_token, y_head)

    state = tl.zeros([BK, BV], dtype=tl.float32)
    if initial is not None and part == 0:
        given = state_of(initial, n, h, H, K * V) + cell
        state += tl.load(given, mask=in_state, other=0.0).to(tl.float32)

    first, last = part_bounds(part, parts, count)
    end = last * STEPS
    if not LAST_END and part == parts - 1:
        end -= STEPS - 1  # what the last segment adds is not read
    for step in range(first * STEPS, end):
        s = step // STEPS
        if REVERSE:
            s = count - 1 - s
        begin = s * L  # of the segment, in its sequence
        inside = tl.minimum(length - begin, L)
        if step % STEPS == 0:
            border = state_of(states, slot0 + s, h, H, K * V) + cell
            tl.store(border, as_stored(state, states.dtype.element_ty, TO_TF32), mask=in_state)
            factor, rest = decay_parts(enter_exponent(log_decay, sums + begin, plane, inside - 1, PER_TOKEN, MASKED))
            state = state * factor + state * rest
        position = (step % STEPS) * BT + tl.arange(0, BT)
        if REVERSE:
            weight = enter(log_decay, sums + begin, plane, position, inside, PER_TOKEN, MASKED)
        else:
            weight = leave(log_decay, sums + begin, plane, position, inside, PER_TOKEN, MASKED)
        ok = tokens_ok(mask, start + begin, position, inside, MASKED)
        token = begin.to(tl.int64)
        xs = tl.trans(load_tile(x + token * x_token, position, k, x_token, ok, K, BK))
        ys = load_tile(y + token * y_token, position, v, y_token, ok, V, BV)
        xs = (xs * (weight * scale)[None, :]).to(x.dtype.element_ty)
        state = tl.dot(xs, ys, state, input_precision=PRECISION)

    if ends is not None:
        tl.store(state_of(ends, n * parts + part, h, H, K * V) + cell, state.to(ends.dtype.element_ty), mask=in_state)
