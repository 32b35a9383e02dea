"""Retention by its definitions: the oracle that everything else is held against, and the exportable backend.

The paper's three forms in plain torch operators, differentiable by autograd, one definition each: `recurrent` is Eq. 6,
`parallel` is Eq. 5, `chunkwise` is Eq. 7 with the in-chunk decay of K^T V that the printed equation leaves out. They
take every argument of `retnet.ops.retention` and compute in the dtype of `v`, decays in float64. Nothing is optimised:
`parallel` builds [B, H, T, T].

    S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t        out_t = scale q_t S_t

Shapes: q, k [B, T, G, K]; v [B, T, H, V]; log_decay [H] or [B, T, H]; state [N, H, K, V]; mask [B, T];
cu_seqlens [N + 1]. All return (out [B, T, H, V], state [N, H, K, V]).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from retnet.ops.decay import decay_from_start, decay_to_end, pairwise_decay, running_log_decay
from retnet.ops.dtypes import wide_dtype


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All tokens at once (Eq. 5): out = (Q K^T * D) V, plus what is left of an earlier state."""
    if cu_seqlens is not None:
        return _each_sequence(parallel, q, k, v, log_decay, scale, state, mask, cu_seqlens)
    q, k, state = _prepare(q, k, v, scale, state)
    if q.shape[1] == 0:
        return torch.zeros_like(v), state
    total, resets = running_log_decay(log_decay, mask, q.shape[1])
    if mask is not None:
        k = k * mask[..., None, None]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * pairwise_decay(total, resets).to(v.dtype)
    from_start = decay_from_start(total, resets)[..., None].to(state.dtype)
    to_end = decay_to_end(total, resets)[..., None].to(v.dtype)
    old = torch.einsum("bthk,bhkv->bthv", q, state.to(v.dtype)) * from_start.to(v.dtype)
    out = torch.einsum("bhts,bshv->bthv", scores, v) + old
    state = from_start[:, -1, :, :, None] * state + torch.einsum("bthk,bthv->bhkv", k * to_end, v)
    return _silence(out, mask), state


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after another (Eq. 6)."""
    if cu_seqlens is not None:
        return _each_sequence(recurrent, q, k, v, log_decay, scale, state, mask, cu_seqlens)
    q, k, state = _prepare(q, k, v, scale, state)
    decay = log_decay.exp().to(state.dtype).expand(*v.shape[:3])[..., None, None]
    out = []
    for t in range(q.shape[1]):
        new = decay[:, t] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = new if mask is None else torch.where(mask[:, t, None, None, None], new, state)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.to(v.dtype)))
    return _silence(torch.stack(out, 1) if out else torch.zeros_like(v), mask), state


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    chunk_size: int,
    scale: float | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Parallel inside a chunk of `chunk_size` tokens, recurrent from chunk to chunk (Eq. 7)."""
    if cu_seqlens is not None:

        def form(*args, **options):
            return chunkwise(*args, chunk_size=chunk_size, **options)

        return _each_sequence(form, q, k, v, log_decay, scale, state, mask, cu_seqlens)
    out = [torch.zeros_like(v[:, :0])]
    *_, state = _prepare(q, k, v, scale, state)
    for start in range(0, max(1, q.shape[1]), chunk_size):
        chunk = slice(start, start + chunk_size)
        out_chunk, state = parallel(
            q[:, chunk],
            k[:, chunk],
            v[:, chunk],
            log_decay if log_decay.dim() == 1 else log_decay[:, chunk],
            scale=scale,
            state=state,
            mask=None if mask is None else mask[:, chunk],
        )
        out.append(out_chunk)
    return torch.cat(out, 1), state


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale q, give every head its group's q and k, and start from zeros where there is no state."""
    heads_per_group = v.shape[2] // q.shape[2]
    q = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).repeat_interleave(heads_per_group, 2)
    k = k.repeat_interleave(heads_per_group, 2)
    if state is None:
        wide = wide_dtype(v.dtype)
        state = torch.zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1], dtype=wide, device=v.device)
    return q, k, state


def _silence(out: Tensor, mask: Tensor | None) -> Tensor:
    return out if mask is None else out.masked_fill(~mask[..., None, None], 0)


def _each_sequence(
    form: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run `form` on every sequence of a packed row by itself."""
    bounds = cu_seqlens.tolist()
    outs, states = [v[:, : bounds[0]]], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        one = slice(start, end)
        out, final = form(
            q[:, one],
            k[:, one],
            v[:, one],
            log_decay if log_decay.dim() == 1 else log_decay[:, one],
            scale=scale,
            state=None if state is None else state[n : n + 1],
            mask=None if mask is None else mask[:, one],
        )
        outs.append(out)
        states.append(final)
    return torch.cat(outs, 1), torch.cat(states, 0)
