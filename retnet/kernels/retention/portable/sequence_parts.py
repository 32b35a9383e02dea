"""The parts of a long sequence, joined: from the states of parts by themselves to the states of the whole.

A state is linear in the state that its part starts from. So all parts run at once, each from zeros (the first one from
the initial state), and what the earlier parts leave is added afterwards:

    start_0 = 0,   start_{p+1} = kept_p start_p + end_p         states[segment] += kept(part's start .. segment) start_p

kept_p is the product of the decays of part p. Parts are whole segments, counted in the direction of the pass.
"""

import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.chain import chain_states
from retnet.kernels.decay import decay_parts
from retnet.kernels.recording import launch
from retnet.kernels.retention.portable.segment_decay import SegmentDecay, decay_of_head, enter_exponent
from retnet.kernels.segments import Segments, sequence_bounds, sequence_of, state_of


def join_parts(
    states: Tensor,
    ends: Tensor,
    final: Tensor | None,
    decay: SegmentDecay,
    segments: Segments,
    *,
    reverse: bool,
    to_tf32: bool,
) -> None:
    """Replace states [slots, H, K, V] of parts by themselves by those of the whole, and fill final [N, H, K, V].

    ends [N, parts, H, K, V], what each part leaves, become starts. `to_tf32` rounds as `border_states` does."""
    N, parts, H, K, V = ends.shape
    where = (
        decay.rate, decay.sums,
        segments.cu_seqlens, segments.first_slot, segments.tokens_per_sequence, segments.num_tokens,
    )  # fmt: skip
    constants = {
        "H": H,
        "SIZE": K * V,
        "L": segments.length,
        "REVERSE": reverse,
        "PER_TOKEN": decay.per_token,
        "MASKED": decay.mask is not None,
        "PACKED": segments.packed,
    }
    grid = N * H, triton.cdiv(K * V, 1024)
    launch(_chain_kernel, grid, ends, final, *where, parts, **constants, BLOCK=1024, num_warps=4)
    block = min(8192, triton.next_power_of_2(K * V))
    grid = segments.num_slots * H, triton.cdiv(K * V, block)
    launch(
        _add_starts_kernel, grid, states, ends, *where, parts, N, **constants,
        TO_TF32=to_tf32, BLOCK=block, num_warps=8,
    )  # fmt: skip


@triton.jit
def part_bounds(part, parts, count):
    """The segments [first, last) of a part of a sequence with `count`, numbered in the direction of the pass."""
    length = tl.cdiv(count, parts)
    return tl.minimum(part * length, count), tl.minimum((part + 1) * length, count)


@triton.jit
def as_stored(state, DTYPE: tl.constexpr, TO_TF32: tl.constexpr):
    """A float32 state as it is stored: in DTYPE, or rounded to tf32, since the next product cuts the further bits."""
    if TO_TF32:
        rounded = ((state.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(state == state, rounded, state)  # rounding could turn the bits of NaN into those of zero
    return state.to(DTYPE)


@triton.jit
def _kept_exponent(
    log_decay, sums, plane, first, last, count, length, L: tl.constexpr, REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr = 64,
):  # fmt: skip
    """The log of the product of the decays of segments [first, last), numbered in the direction of the pass.

    `sums` points at the first token of the sequence, which has `length` tokens in `count` segments."""
    total = 0.0
    for i in range(first, last, BLOCK):
        segment = i + tl.arange(0, BLOCK)
        inside = segment < last
        segment = tl.where(inside, segment, first)
        if REVERSE:
            segment = count - 1 - segment
        begin = segment * L
        end = tl.minimum(length - begin, L) - 1
        exponent = enter_exponent(log_decay, sums + begin, plane, end, PER_TOKEN, MASKED)
        total += tl.sum(tl.where(inside, exponent, 0.0), 0)
    return total


@triton.jit
def _part_exponent(
    part, there, log_decay, sums, plane, parts, count, length, L: tl.constexpr, REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`_kept_exponent` of a whole part; 0 for a part past the last, which has no segments."""
    first, last = part_bounds(part, parts, count)
    return _kept_exponent(log_decay, sums, plane, first, last, count, length, L, REVERSE, PER_TOKEN, MASKED)


@triton.jit
def _keep(state, exponent):
    factor, rest = decay_parts(exponent)
    return state * factor + state * rest


@triton.jit(do_not_specialize=["T", "num_tokens", "parts"])
def _chain_kernel(
    ends, final, rate, sums, cu_seqlens, first_slot, T, num_tokens, parts,
    H: tl.constexpr, SIZE: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ends -> starts, and the last part's end -> final. Grid: N H, blocks of a state."""
    n, h = tl.program_id(0) // H, tl.program_id(0) % H
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, length, _, count = sequence_bounds(n, cu_seqlens, first_slot, T, L, PACKED)
    log_decay, sums, plane = decay_of_head(rate, sums, num_tokens, h, start, H, PER_TOKEN, MASKED)
    added = parts
    if final is None:
        added = parts - 1  # what the last part leaves was not stored
    state = chain_states(
        tl.zeros([BLOCK], dtype=tl.float32), state_of(ends, n * parts, h, H, SIZE), cell, cell < SIZE, H * SIZE,
        parts, added,
        _part_exponent, (log_decay, sums, plane, parts, count, length, L, REVERSE, PER_TOKEN, MASKED), _keep, (),
    )  # fmt: skip
    if final is not None:
        tl.store(state_of(final, n, h, H, SIZE) + cell, state.to(final.dtype.element_ty), mask=cell < SIZE)


@triton.jit(do_not_specialize=["T", "num_tokens", "parts", "num_sequences"])
def _add_starts_kernel(
    states, starts, rate, sums, cu_seqlens, first_slot, T, num_tokens, parts, num_sequences,
    H: tl.constexpr, SIZE: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr,
    PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    TO_TF32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states[slot] += what is left there of its part's start. Grid: slots H, blocks of a state."""
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    if PACKED:
        n = sequence_of(slot, first_slot, num_sequences)
        if n >= num_sequences:
            return
    else:
        n = slot // tl.cdiv(T, L)
    start, length, slot0, count = sequence_bounds(n, cu_seqlens, first_slot, T, L, PACKED)
    step = slot - slot0
    if REVERSE:
        step = count - 1 - step
    part = step // tl.cdiv(count, parts)
    if part == 0:
        return
    log_decay, sums, plane = decay_of_head(rate, sums, num_tokens, h, start, H, PER_TOKEN, MASKED)
    first, _ = part_bounds(part, parts, count)
    exponent = _kept_exponent(log_decay, sums, plane, first, step, count, length, L, REVERSE, PER_TOKEN, MASKED)
    if exponent < -104.0:  # exp() is 0
        return
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = state_of(states, slot, h, H, SIZE) + cell
    given = tl.load(state_of(starts, n * parts + part, h, H, SIZE) + cell, mask=cell < SIZE, other=0.0)
    state = tl.load(at, mask=cell < SIZE, other=0.0).to(tl.float32) + given * tl.exp(exponent)
    tl.store(at, as_stored(state, states.dtype.element_ty, TO_TF32), mask=cell < SIZE)
