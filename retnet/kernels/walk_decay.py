"""The gradient of a fixed log_decay [H] from saved states and the other gradients.

What crosses token t is scaled by exp(log_decay), so the gradient is a sum over tokens of the inner product of what
crosses with its adjoint. Within a segment with last state S and the gradient E of that state,

    <crossing t> = <S, E> + sum_{i >= t} (q_i . dq_i - k_i . dk_i)

and the sum over t counts the i-th token of the segment i + 1 times. Sums restart at every segment: one running sum of
q . dq - k . dk over the whole sequence would cancel its way to the answer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def decay_gradient(
    q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, states: Tensor, dstates: Tensor,
    final: Tensor, dfinal: Tensor | None, segment: int,
) -> Tensor:  # fmt: skip
    """q, dq, k, dk [B, T, H, K], (d)states [B * H * segments, V, K], (d)final [B, H, K, V] -> dlog_decay [H]."""
    B, T, H, K = q.shape
    V = states.shape[1]
    segments = triton.cdiv(T, segment)
    partial = torch.empty(B, H, segments, dtype=torch.float32, device=q.device)
    q, k = q.contiguous(), k.contiguous()
    _decay_kernel[(segments, B * H)](
        q, dq, k, dk, states, dstates, partial, T, H, segments, SIZE=K * V, K=K, SEGMENT=segment,
        ROWS=32, BLOCK=min(4096, K * V), num_warps=4,
    )  # fmt: skip
    total = partial.sum((0, 2))
    if dfinal is not None:
        length = T - (segments - 1) * segment
        total = total + length * (final * dfinal).sum((0, 2, 3))
    return total


@triton.jit(do_not_specialize=["tokens", "segments"])
def _decay_kernel(
    q, dq, k, dk, states, dstates, partial, tokens, heads, segments,
    SIZE: tl.constexpr, K: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = tl.program_id(1)
    first = n * SEGMENT
    length = tl.minimum(SEGMENT, tokens - first)
    crossing = tl.zeros((BLOCK,), dtype=tl.float32)
    if n + 1 < segments:  # the state that leaves a segment enters the next
        leaving = states + (row.to(tl.int64) * segments + n + 1) * SIZE
        adjoint = dstates + (row.to(tl.int64) * segments + n) * SIZE
        for i in range(0, SIZE, BLOCK):
            at = i + tl.arange(0, BLOCK)
            crossing += tl.load(leaving + at).to(tl.float32) * tl.load(adjoint + at).to(tl.float32)
    flow = tl.zeros((ROWS,), dtype=tl.float32)
    key = tl.arange(0, K)[None, :]
    for i in range(0, SEGMENT, ROWS):
        token = i + tl.arange(0, ROWS)
        inside = (token < length)[:, None]
        at = ((row // heads).to(tl.int64) * tokens + first + token)[:, None] * heads * K + (row % heads) * K + key
        q_row = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
        dq_row = tl.load(dq + at, mask=inside, other=0.0).to(tl.float32)
        k_row = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        dk_row = tl.load(dk + at, mask=inside, other=0.0).to(tl.float32)
        flow += (token + 1).to(tl.float32) * tl.sum(q_row * dq_row - k_row * dk_row, 1)
    total = length.to(tl.float32) * tl.sum(crossing, 0) + tl.sum(flow, 0)
    tl.store(partial + row.to(tl.int64) * segments + n, total)
