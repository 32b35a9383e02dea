"""Chunkwise retention (paper Eq. 7) in plain Triton, for every argument and every GPU that Triton knows.

Two passes each way: a walk leaves the state at every segment's border, then all segments run at once. The backward pass
recomputes the forward's states instead of saving them: memory beyond inputs, outputs and gradients is one state a
segment (two where log_decay has a gradient), in bfloat16 for bfloat16 inputs. No host synchronisation, no atomics: two
runs give the same bits.
"""

import torch
from torch import Tensor

from retnet.kernels.decay import Decay
from retnet.kernels.decay_grad import decay_gradient
from retnet.kernels.layout import Layout
from retnet.kernels.segment import read_segments
from retnet.kernels.states import walk_states
from retnet.kernels.tiles import Tiles, tiles_on


def portable_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    state_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, G, K], v [B, T, H, V] -> out [B, T, H, V] in v's dtype, final state [N, H, K, V] in `state_dtype`."""
    tiles, layout, decay = _prepare(q, v, log_decay, mask, cu_seqlens, chunk_size)
    q, k, v_rows = _rows(q), _rows(k), _rows(v)
    states, final = walk_states(
        k, v_rows, decay, layout, tiles.state, scale=1.0, initial=state, final_dtype=state_dtype, reverse=False
    )
    out, _ = read_segments(
        q,
        k,
        v_rows,
        states,
        decay,
        layout,
        tiles.key_contraction,
        state_scale=scale,
        pair_scale=scale,
        reverse=False,
        sum_heads=False,
    )
    return out.view(v.shape), final


def portable_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients (dq, dk, dv, dlog_decay or None, dstate [N, H, K, V] float32) from dout and dfinal, if any."""
    tiles, layout, decay = _prepare(q, v, log_decay, mask, cu_seqlens, chunk_size)
    shapes = q.shape, k.shape, v.shape
    dout, q, k, v = _rows(dout.to(v.dtype)), _rows(q), _rows(k), _rows(v)
    states, final = walk_states(
        k,
        v,
        decay,
        layout,
        tiles.state,
        scale=1.0,
        initial=state,
        final_dtype=torch.float32,
        reverse=False,
    )
    dq, q_dot_dq = read_segments(
        dout,
        v,
        k,
        states,
        decay,
        layout,
        tiles.value_contraction,
        state_scale=scale,
        pair_scale=scale,
        reverse=False,
        sum_heads=True,
        row_dot_with=q if need_dlog_decay else None,
    )
    if not need_dlog_decay:
        del states  # before the adjoint states take as much memory
    dstates, dstate = walk_states(
        q, dout, decay, layout, tiles.state, scale=scale, initial=dfinal, final_dtype=torch.float32, reverse=True
    )
    dv, _ = read_segments(
        k,
        q,
        dout,
        dstates,
        decay,
        layout,
        tiles.key_contraction,
        state_scale=1.0,
        pair_scale=scale,
        reverse=True,
        sum_heads=False,
    )
    dk, k_dot_dk = read_segments(
        v,
        dout,
        q,
        dstates,
        decay,
        layout,
        tiles.value_contraction,
        state_scale=1.0,
        pair_scale=scale,
        reverse=True,
        sum_heads=True,
        row_dot_with=k if need_dlog_decay else None,
    )
    dlog_decay = None
    if q_dot_dq is not None and k_dot_dk is not None:
        dfinal = None if dfinal is None else dfinal.contiguous()
        grad = decay_gradient(q_dot_dq, k_dot_dk, states, dstates, final, dfinal, decay, layout)
        dlog_decay = grad.view(log_decay.shape) if decay.per_token else grad.sum(0)
    return dq.view(shapes[0]), dk.view(shapes[1]), dv.view(shapes[2]), dlog_decay, dstate


def portable_tiles(
    q: Tensor, v: Tensor, num_sequences: int, chunk_size: int | None, *, per_token: bool = False
) -> Tiles:
    """The block shapes for q [B, T, G, K] and v [B, T, H, V] in `num_sequences` sequences."""
    heads = num_sequences * v.shape[2]
    return tiles_on(q.device, v.dtype, q.shape[-1], v.shape[-1], heads, per_token, chunk_size)


def _prepare(
    q: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, chunk_size: int | None
) -> tuple[Tiles, Layout, Decay]:
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = portable_tiles(q, v, num_sequences, chunk_size, per_token=log_decay.dim() == 3)
    layout = Layout.of(q.shape[0], q.shape[1], tiles.segment, cu_seqlens)
    return tiles, layout, Decay.of(log_decay, mask, layout)


def _rows(x: Tensor) -> Tensor:
    """[B, T, heads, width] -> [B T, heads, width] with contiguous rows, a view wherever the strides allow one."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.flatten(0, 1)
