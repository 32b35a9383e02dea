"""The gradient of log_decay.

Whatever crosses token t is scaled by exp(log_decay_t). So its gradient is the inner product of what crosses with its
adjoint,

    dlog_decay_t = <S_end, dS_end> + sum_{i >= t, same segment} (q_i . dq_i - k_i . dk_i)

with the state and its adjoint at the end of t's segment. A sum of q . dq - k . dk over the whole sequence would lose
its digits to cancellation. Nothing crosses a hard reset: sums stop there, and the gradient of a reset is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch
from retnet.kernels.retention.portable.segment_decay import SegmentDecay, running
from retnet.kernels.segments import Segments, segment_bounds, sequence_of, state_of, tokens_ok


def decay_gradient(
    q_dot_dq: Tensor,
    k_dot_dk: Tensor,
    states: Tensor,
    dstates: Tensor,
    final: Tensor | None,
    dfinal: Tensor | None,
    decay: SegmentDecay,
    segments: Segments,
) -> Tensor:
    """Inner products [tiles, H, tokens] and border states [slots, H, K, V] -> dlog_decay [tokens, H] float32.

    `final` and `dfinal` [N, H, K, V] are the final state and its adjoint; None if the loss does not read that state.
    """
    H = q_dot_dq.shape[1]
    grad = torch.zeros(segments.num_tokens, H, dtype=torch.float32, device=states.device)
    if segments.num_slots == 0:
        return grad
    launch(
        _decay_gradient_kernel,
        (segments.num_slots, H),
        q_dot_dq,
        k_dot_dk,
        states,
        dstates,
        final,
        dfinal,
        grad,
        decay.sums,
        decay.mask,
        segments.table,
        segments.first_slot,
        segments.tokens_per_sequence,
        segments.num_tokens,
        segments.num_sequences,
        H=H,
        STATE=states.shape[2] * states.shape[3],
        TILES_Q=q_dot_dq.shape[0],
        TILES_K=k_dot_dk.shape[0],
        L=segments.length,
        BLOCK=4096,
        PER_TOKEN=decay.per_token,
        MASKED=decay.mask is not None,
        PACKED=segments.packed,
        num_warps=8,
    )
    return grad


@triton.jit(do_not_specialize=["T", "num_tokens", "num_sequences"])
def _decay_gradient_kernel(
    q_dot_dq, k_dot_dk, states, dstates, final, dfinal, grad,
    sums, mask, table, first_slot, T, num_tokens, num_sequences,
    H: tl.constexpr, STATE: tl.constexpr, TILES_Q: tl.constexpr, TILES_K: tl.constexpr, L: tl.constexpr,
    BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    slot, h = tl.program_id(0), tl.program_id(1)
    start, length, is_last = segment_bounds(slot, table, T, L, PACKED)
    if length <= 0:
        return
    crossing = 0.0
    if not is_last:
        after = state_of(states, slot + 1, h, H, STATE)
        crossing = _inner_product(after, state_of(dstates, slot, h, H, STATE), STATE, BLOCK)
    elif dfinal is not None:
        if PACKED:
            n = sequence_of(slot, first_slot, num_sequences)
        else:
            n = slot // tl.cdiv(T, L)
        last = state_of(final, n, h, H, STATE)
        crossing = _inner_product(last, state_of(dfinal, n, h, H, STATE), STATE, BLOCK)

    position = tl.arange(0, L)
    plane = num_tokens.to(tl.int64)
    inside = position < length
    flow = tl.zeros([L], dtype=tl.float32)
    for tile in range(TILES_Q):
        flow += tl.load(q_dot_dq + (tile * H + h) * plane + start + position, mask=inside, other=0.0)
    for tile in range(TILES_K):
        flow -= tl.load(k_dot_dk + (tile * H + h) * plane + start + position, mask=inside, other=0.0)
    if PER_TOKEN:
        head_sums = sums + h * plane + start
        _, _, resets = running(head_sums, H * plane, position, length, PER_TOKEN, MASKED)
        _, _, last = running(head_sums, H * plane, length - 1, length, PER_TOKEN, MASKED)
        _, _, before = running(head_sums, H * plane, tl.maximum(position - 1, 0), length, PER_TOKEN, MASKED)
        is_reset = resets > tl.where(position == 0, 0.0, before)
        value = sum_until_reset(flow, crossing, resets, last, is_reset)
    else:
        value = tl.cumsum(flow, 0, reverse=True) + crossing
    ok = tokens_ok(mask, start, position, length, MASKED)
    tl.store(grad + (start + position) * H + h, tl.where(ok, value, 0.0), mask=inside)


@triton.jit
def sum_until_reset(flow, crossing, resets, last, is_reset):
    """dlog_decay of a segment: `flow` from each token until the next reset, or until the end with its `crossing`.

    `resets`: the resets through each token; `last`: those of the segment."""
    position = tl.arange(0, flow.shape[0])
    pair = (position[None, :] >= position[:, None]) & (resets[None, :] == resets[:, None])
    value = tl.sum(tl.where(pair, flow[None, :], 0.0), 1) + tl.where(resets == last, crossing, 0.0)
    return tl.where(is_reset, 0.0, value)


@triton.jit
def _inner_product(a, b, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i0 in range(0, SIZE, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        x, y = tl.load(a + i, mask=i < SIZE, other=0.0), tl.load(b + i, mask=i < SIZE, other=0.0)
        total += x.to(tl.float32) * y.to(tl.float32)
    return tl.sum(total, 0)
