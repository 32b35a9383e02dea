"""Recurrent retention (Eq. 6 of the paper) on the CPU, one token after another.

S <- exp(log_decay_t) S + k_t^T v_t        out_t = scale q_t S
"""

import torch
from torch import Tensor

from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops.dtypes import wide_dtype
from retnet.ops.ragged import equal_blocks
from retnet.ops.recurrence import SLOW_ABOVE, StepDecay, advance_


def step_(problem: RetentionProblem, state: Tensor) -> Tensor:
    """T tokens, with the state [B, H, K, V] updated in place; returns out [B, T, H, V] in v's dtype.

    A state narrower than float32 is widened for the T tokens and rounded once. A token whose mask [B, T] is False
    leaves the state alone and gives 0. The problem's own state is not read.
    """
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    B, T, H, _ = v.shape
    heads_per_group = H // q.shape[2]
    wide = wide_dtype(v.dtype)
    S = state if state.dtype == wide else state.to(wide)
    log_decay = problem.log_decay.expand(B, T, H)
    all_slow = (log_decay > SLOW_ABOVE).all(0).all(-1).tolist()
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for t in range(T):
        q_t, k_t = (x[:, t].to(wide).repeat_interleave(heads_per_group, 1) for x in (q, k))
        v_t, decay = v[:, t].to(wide), StepDecay(log_decay[:, t], all_slow=all_slow[t])
        if mask is not None:
            absent = ~mask[:, t, None]
            q_t, k_t, v_t = (x.masked_fill(absent[..., None], 0) for x in (q_t, k_t, v_t))
            decay = decay.masked(absent)
        advance_(S, decay, k_t, v_t)
        out[:, t] = torch.matmul((q_t * problem.scale)[..., None, :], S)[..., 0, :]
    if S is not state:
        state.copy_(S)
    return out


def forward(problem: RetentionProblem, bounds: list[int] | None, state_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, V], state [N, H, K, V] in state_dtype) of every sequence; the given state is left as it was."""
    v, state = problem.v, problem.state
    wide = wide_dtype(v.dtype)
    if state is None:
        final = torch.zeros(problem.state_shape, dtype=wide, device=v.device)
    else:
        final = state.to(wide, copy=True)
    if bounds is None:
        return step_(problem, final), final.to(state_dtype)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for rows, tokens, sequences in equal_blocks(v.shape[0], v.shape[1], bounds):
        out[rows, tokens] = step_(problem.block(rows, tokens, sequences), final[sequences])
    return out, final.to(state_dtype)
