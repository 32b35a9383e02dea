"""Recurrent retention (Eq. 6 of the paper) with the state updated in place: the decode step of the CPU.

S <- exp(log_decay_t) S + k_t^T v_t        out_t = scale q_t S
"""

import torch
from torch import Tensor

from retnet.ops.dtypes import wide_dtype
from retnet.ops.ragged import equal_blocks


def step_(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Read T tokens one after another. state [B, H, K, V] changes in place; returns out [B, T, H, V] in v's dtype.

    A state narrower than float32 is widened for the T tokens and rounded once. A token whose mask [B, T] is False
    leaves the state alone and gives 0.
    """
    B, T, H, _ = v.shape
    heads_per_group = H // q.shape[2]
    wide = wide_dtype(v.dtype)
    S = state if state.dtype == wide else state.to(wide)
    log_decay = log_decay.expand(B, T, H)[..., None, None]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for t in range(T):
        q_t, k_t = (x[:, t].to(wide).repeat_interleave(heads_per_group, 1) for x in (q, k))
        v_t, log_decay_t = v[:, t].to(wide), log_decay[:, t]
        if mask is not None:
            absent = ~mask[:, t, None, None]
            q_t, k_t, v_t = (x.masked_fill(absent, 0) for x in (q_t, k_t, v_t))
            log_decay_t = log_decay_t.masked_fill(absent[..., None], 0)
        _decay_(S, log_decay_t).addcmul_(k_t[..., None], v_t[..., None, :])
        out[:, t] = torch.matmul((q_t * scale)[..., None, :], S)[..., 0, :]
    if S is not state:
        state.copy_(S)
    return out


def _decay_(S: Tensor, log_decay: Tensor) -> Tensor:
    """S <- exp(log_decay) S, in place. Slow decays subtract, S + expm1(log_decay) S: exp(log_decay) itself would be
    rounded to the same side at every token, and thousands of tokens add that up."""
    slow = log_decay > -0.5
    if not bool(slow.all()):
        S.mul_(log_decay.masked_fill(slow, 0).exp())
    return S.addcmul_(S, log_decay.masked_fill(~slow, 0).expm1().to(S.dtype))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    bounds: list[int] | None,
    state_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, V], state [N, H, K, V] in state_dtype) of every sequence, the given state left as it was."""
    num_sequences = v.shape[0] if bounds is None else len(bounds) - 1
    wide = wide_dtype(v.dtype)
    shape = (num_sequences, v.shape[2], q.shape[3], v.shape[3])
    final = torch.zeros(shape, dtype=wide, device=v.device) if state is None else state.to(wide, copy=True)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for rows, tokens, sequences in equal_blocks(v.shape[0], v.shape[1], bounds):
        decay = log_decay if log_decay.dim() == 1 else log_decay[rows, tokens]
        out[rows, tokens] = step_(q[rows, tokens], k[rows, tokens], v[rows, tokens], decay, final[sequences], scale)
    return out, final.to(state_dtype)
