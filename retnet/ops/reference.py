"""Retention by its definitions: the oracle of all tests, and the exportable backend.

The paper's three forms in plain torch operators, differentiable by autograd, one definition each: `recurrent` is Eq. 6,
`parallel` is Eq. 5, `chunkwise` is Eq. 7 with the in-chunk decay of K^T V that the printed equation leaves out. They
take the tensors and options of `retnet.ops.retention` and compute in the dtype of `v`, decays in float64. Nothing is
optimised: `parallel` builds [B, H, T, T].

    S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t        out_t = scale q_t S_t

Shapes: q, k [B, T, G, K]; v [B, T, H, V]; log_decay [H] or [B, T, H]; state [N, H, K, V]; mask [B, T];
cu_seqlens [N + 1]. All return (out [B, T, H, V], state [N, H, K, V]).
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops.decay import decay_from_start, decay_to_end, pairwise_decay, running_log_decay
from retnet.ops.dtypes import wide_dtype

Form = Callable[[RetentionProblem], tuple[Tensor, Tensor]]


def _form(solve: Form) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function with the operator's arguments for a form of one [B, T] batch without packing."""

    def form(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        *,
        scale: float | None = None,
        state: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return of_sequences(solve, RetentionProblem(q, k, v, log_decay, factor, state, mask, cu_seqlens, chunk_size))

    form.__doc__ = solve.__doc__
    return form


def of_sequences(solve: Form, problem: RetentionProblem) -> tuple[Tensor, Tensor]:
    """A form of a problem; every sequence of a packed row by itself."""
    if problem.cu_seqlens is None:
        return solve(problem)
    bounds = problem.cu_seqlens.tolist()
    outs, states = [problem.v[:, : bounds[0]]], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        one = _part(problem, slice(start, end))
        out, final = solve(replace(one, state=None if one.state is None else one.state[n : n + 1], cu_seqlens=None))
        outs.append(out)
        states.append(final)
    return torch.cat(outs, 1), torch.cat(states, 0)


def _parallel(problem: RetentionProblem) -> tuple[Tensor, Tensor]:
    """All tokens at once (Eq. 5): out = (Q K^T * D) V, plus what is left of an earlier state."""
    v, mask = problem.v, problem.mask
    q, k, state = _prepare(problem)
    if q.shape[1] == 0:
        return torch.zeros_like(v), state
    total, resets = running_log_decay(problem.log_decay, mask, q.shape[1])
    if mask is not None:
        k = k * mask[..., None, None]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * pairwise_decay(total, resets).to(v.dtype)
    from_start = decay_from_start(total, resets)[..., None].to(state.dtype)
    to_end = decay_to_end(total, resets)[..., None].to(v.dtype)
    old = torch.einsum("bthk,bhkv->bthv", q, state.to(v.dtype)) * from_start.to(v.dtype)
    out = torch.einsum("bhts,bshv->bthv", scores, v) + old
    state = from_start[:, -1, :, :, None] * state + torch.einsum("bthk,bthv->bhkv", k * to_end, v)
    return _silence(out, mask), state


def _recurrent(problem: RetentionProblem) -> tuple[Tensor, Tensor]:
    """One token after another (Eq. 6)."""
    v, mask = problem.v, problem.mask
    q, k, state = _prepare(problem)
    decay = problem.log_decay.exp().to(state.dtype).expand(*v.shape[:3])[..., None, None]
    out = []
    for t in range(q.shape[1]):
        new = decay[:, t] * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = new if mask is None else torch.where(mask[:, t, None, None, None], new, state)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.to(v.dtype)))
    return _silence(torch.stack(out, 1) if out else torch.zeros_like(v), mask), state


def _chunkwise(problem: RetentionProblem) -> tuple[Tensor, Tensor]:
    """Parallel inside a chunk of `chunk_size` tokens, recurrent from chunk to chunk (Eq. 7)."""
    assert problem.chunk_size is not None
    out = [torch.zeros_like(problem.v[:, :0])]
    *_, state = _prepare(problem)
    for start in range(0, max(1, problem.q.shape[1]), problem.chunk_size):
        chunk = _part(problem, slice(start, start + problem.chunk_size))
        out_chunk, state = _parallel(replace(chunk, state=state))
        out.append(out_chunk)
    return torch.cat(out, 1), state


def _part(problem: RetentionProblem, tokens: slice) -> RetentionProblem:
    """Some tokens of every row."""
    q, k, v = (x[:, tokens] for x in (problem.q, problem.k, problem.v))
    log_decay = problem.log_decay[:, tokens] if problem.per_token else problem.log_decay
    mask = None if problem.mask is None else problem.mask[:, tokens]
    return replace(problem, q=q, k=k, v=v, log_decay=log_decay, mask=mask)


def _prepare(problem: RetentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Scale q, give every head its group's q and k, and start from zeros where there is no state."""
    q, k, v, state = problem.q, problem.k, problem.v, problem.state
    heads_per_group = v.shape[2] // q.shape[2]
    q = (q * problem.scale).repeat_interleave(heads_per_group, 2)
    k = k.repeat_interleave(heads_per_group, 2)
    if state is None:
        wide = wide_dtype(v.dtype)
        state = torch.zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1], dtype=wide, device=v.device)
    return q, k, state


def _silence(out: Tensor, mask: Tensor | None) -> Tensor:
    return out if mask is None else out.masked_fill(~mask[..., None, None], 0)


FORMS: dict[str, Form] = {"parallel": _parallel, "recurrent": _recurrent, "chunkwise": _chunkwise}
parallel, recurrent, chunkwise = _form(_parallel), _form(_recurrent), _form(_chunkwise)


def in_wide_dtype(mode: str, problem: RetentionProblem) -> tuple[Tensor, Tensor]:
    """A form by name in float32 (float64 for float64), for inputs of any dtype: out in v's dtype, and the state.

    NaN and infinity under the mask have no effect.
    """
    mask, log_decay, wide = problem.mask, problem.log_decay, wide_dtype(problem.v.dtype)
    q, k, v = (x.to(wide) for x in (problem.q, problem.k, problem.v))
    if mask is not None:
        q, k, v = (x.masked_fill(~mask[..., None, None], 0) for x in (q, k, v))
        log_decay = log_decay.masked_fill(~mask[..., None], 0) if problem.per_token else log_decay
    state = None if problem.state is None else problem.state.to(wide)
    out, final = of_sequences(FORMS[mode], replace(problem, q=q, k=k, v=v, log_decay=log_decay, state=state))
    return out.to(problem.v.dtype), final
