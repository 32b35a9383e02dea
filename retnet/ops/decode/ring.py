"""Deferred writes of decoding: the last few keys and values of a sequence kept beside its state.

Reading a state costs half of what reading and writing it costs. With a ring, a step reads the state as it was up to
W - 1 tokens ago and adds the later tokens from the ring; the token that fills the ring writes all W into the state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ring:
    """The tokens not yet written to a state: keys [B, G, W, K], values [B, G, W, V], log_decay [B, H, W].

    pending [B] int64 counts them for each sequence, fewer than W; layers that step together share it.
    """

    keys: Tensor
    values: Tensor
    log_decay: Tensor
    pending: Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.log_decay))

    def slot(self, index: int) -> "Ring":
        """The tokens of one sequence, as views."""
        return Ring(*(x[index : index + 1] for x in (self.keys, self.values, self.log_decay, self.pending)))

    def folded(self, state: Tensor) -> Tensor:
        """The states [B, H, K, V] with the pending tokens written, as new tensors."""
        W, heads_per_group = self.keys.shape[2], state.shape[1] // self.keys.shape[1]
        kept = torch.arange(W, device=state.device) < self.pending[:, None]
        decay, since = _decays(self.log_decay, kept[:, None])
        keys, values = (_per_head(x, kept, heads_per_group).to(state.dtype) for x in (self.keys, self.values))
        return state * decay[..., None, None] + (keys * since[..., None]).mT @ values


def ring_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, active: Tensor | None, ring: Ring
) -> Tensor:
    """One token with deferred writing: out [B, H, V]; q [B, H, K] scaled, q and k rotated.

    Writing W tokens at once is another sum than W times `recurrence.advance_`: the state is rounded once per W tokens,
    so that rounding its decay does not add up.
    """
    W, heads_per_group = ring.keys.shape[2], q.shape[1] // k.shape[1]
    sequence = torch.arange(len(q), device=q.device)
    if active is not None:
        sequence = sequence[active]
    for stored, new in ((ring.keys, k), (ring.values, v), (ring.log_decay, log_decay)):
        stored[sequence, :, ring.pending[sequence]] = new[sequence].to(stored.dtype)
    kept = torch.arange(W, device=q.device) <= ring.pending[:, None]
    decay, since = _decays(ring.log_decay, kept[:, None])
    keys, values = (_per_head(x, kept, heads_per_group).to(state.dtype) for x in (ring.keys, ring.values))
    score = (keys @ q[..., None])[..., 0] * since
    out = (q[..., None, :] @ state)[..., 0, :] * decay[..., None] + (score[..., None, :] @ values)[..., 0, :]
    for b in sequence[ring.pending[sequence] == W - 1].tolist():
        state[b].mul_(decay[b, :, None, None]).baddbmm_((keys[b] * since[b, ..., None]).mT, values[b])
    return out if active is None else out.masked_fill(~active[:, None, None], 0)


def _decays(log_decay: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Decays (over all tokens [B, H], from each token to the last [B, H, W]) of log decays [B, H, W], of kept tokens.

    Suffix sums, not differences: -inf is a reset. 0 where no token is kept.
    """
    log_decay = log_decay.masked_fill(~kept, 0)
    later = torch.ones(log_decay.shape[-1], log_decay.shape[-1], device=log_decay.device).tril(-1).bool()
    since = torch.where(later.mT, log_decay[..., None, :], 0).sum(-1)
    return log_decay.sum(-1).exp(), since.exp().masked_fill(~kept, 0)


def _per_head(x: Tensor, kept: Tensor, heads_per_group: int) -> Tensor:
    """[B, G, W, K] -> [B, H, W, K], 0 where no token is kept (the memory there may hold anything)."""
    x = x.masked_fill(~kept[:, None, :, None], 0)
    return x if heads_per_group == 1 else x.repeat_interleave(heads_per_group, 1)
