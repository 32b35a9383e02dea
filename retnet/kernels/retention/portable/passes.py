"""Forward and backward pass in plain Triton (paper, Eq. 7), for every argument and every GPU that Triton supports.

Each pass has two stages: the border states are made, then all segments are read at once. The backward pass recomputes
the forward's border states instead of saving them. Memory beyond inputs, outputs and gradients is one state per segment
(two where log_decay has a gradient), in bfloat16 for bfloat16 inputs. No host synchronisation and no atomics: two runs
give the same bits.
"""

import torch
from torch import Tensor

from retnet.kernels.retention.portable.border_states import border_states, most_parts
from retnet.kernels.retention.portable.decay_gradient import decay_gradient
from retnet.kernels.retention.portable.segment_decay import SegmentDecay
from retnet.kernels.retention.portable.segment_kernel import read_segments
from retnet.kernels.retention.portable.segment_read import SegmentRead
from retnet.kernels.retention.problem import RetentionGradients, RetentionProblem
from retnet.kernels.retention.tile_shapes import Tiles
from retnet.kernels.retention.tiles import SEGMENT_LENGTHS, tiles_on
from retnet.kernels.segments import Segments


def portable_forward(problem: RetentionProblem, state_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """out [B, T, H, V] in v's dtype, and the final state [N, H, K, V] in `state_dtype` (None: not computed)."""
    tiles, segments, decay = _prepare(problem)
    scale = problem.scale
    q, k, v = _flat_tokens(problem.q), _flat_tokens(problem.k), _flat_tokens(problem.v)
    states, final = border_states(
        k, v, decay, segments, tiles.state, scale=1.0, initial=problem.state, final_dtype=state_dtype, reverse=False
    )
    read = SegmentRead(q, k, v, states, decay, segments, scale, scale, reverse=False, sum_heads=False)
    out, _ = read_segments(read, tiles.key_contraction)
    return out.view(problem.v.shape), final


def portable_backward(
    problem: RetentionProblem, dout: Tensor, dfinal: Tensor | None, *, need_dlog_decay: bool, need_dstate: bool
) -> RetentionGradients:
    """The gradients, given those of the output and of the final state, if any."""
    tiles, segments, decay = _prepare(problem)
    scale = problem.scale
    dout, q, k, v = (_flat_tokens(x) for x in (dout.to(problem.v.dtype), problem.q, problem.k, problem.v))
    states, final = border_states(
        k,
        v,
        decay,
        segments,
        tiles.state,
        scale=1.0,
        initial=problem.state,
        final_dtype=torch.float32 if need_dlog_decay and dfinal is not None else None,
        reverse=False,
    )
    read = SegmentRead(dout, v, k, states, decay, segments, scale, scale, reverse=False, sum_heads=True)
    read.dot_with = q if need_dlog_decay else None
    dq, q_dot_dq = read_segments(read, tiles.value_contraction)
    if not need_dlog_decay:
        del states, read  # before the adjoint states take as much memory
    dstates, dstate = border_states(
        q,
        dout,
        decay,
        segments,
        tiles.state,
        scale=scale,
        initial=dfinal,
        final_dtype=torch.float32 if need_dstate else None,
        reverse=True,
    )
    read = SegmentRead(k, q, dout, dstates, decay, segments, 1.0, scale, reverse=True, sum_heads=False)
    dv, _ = read_segments(read, tiles.key_contraction)
    read = SegmentRead(v, dout, q, dstates, decay, segments, 1.0, scale, reverse=True, sum_heads=True)
    read.dot_with = k if need_dlog_decay else None
    dk, k_dot_dk = read_segments(read, tiles.value_contraction)
    dlog_decay = None
    if q_dot_dq is not None and k_dot_dk is not None:
        dfinal = None if dfinal is None else dfinal.contiguous()
        grad = decay_gradient(q_dot_dq, k_dot_dk, states, dstates, final, dfinal, decay, segments)
        dlog_decay = grad.view(problem.log_decay.shape) if decay.per_token else grad.sum(0)
    shapes = problem.q.shape, problem.k.shape, problem.v.shape
    return RetentionGradients(dq.view(shapes[0]), dk.view(shapes[1]), dv.view(shapes[2]), dlog_decay, dstate)


def portable_tiles(problem: RetentionProblem) -> Tiles:
    """The block shapes of a problem."""
    q, v = problem.q, problem.v
    sequences, per_token = problem.num_sequences, problem.log_decay.dim() == 3
    num_states = sequences * v.shape[2] * most_parts(v.shape[0] * v.shape[1], sequences, max(SEGMENT_LENGTHS))
    return tiles_on(q.device, v.dtype, q.shape[-1], v.shape[-1], num_states, per_token, problem.chunk_size)


def _prepare(problem: RetentionProblem) -> tuple[Tiles, Segments, SegmentDecay]:
    tiles = portable_tiles(problem)
    B, T = problem.q.shape[:2]
    segments = Segments.of(B, T, tiles.segment, problem.cu_seqlens)
    return tiles, segments, SegmentDecay.of(problem.log_decay, problem.mask, segments)


def _flat_tokens(x: Tensor) -> Tensor:
    """[B, T, heads, width] -> [B T, heads, width] with a contiguous last axis; a view where the strides allow it."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.flatten(0, 1)
