"""What a few tokens would write into a state, kept apart from it: drafts that may yet be rejected.

Rolling back is not undoing: the state is left as it was before the draft, and of the draft's rows only the accepted
ones are written, by the same operation that decodes token by token. That costs O(T (K + V)) a head and is exact, where
a copy of the state for every token would cost T K V. Every kind of state has its kind of rows; Hyena's, which reads all
earlier inputs again, has none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from retnet.layers.state import AttentionState, Mamba1State, Mamba2State, RetentionState
from retnet.ops.retention import retention_step_
from retnet.ops.selective_scan import selective_scan_step


@dataclass
class RetentionRows:
    """k [B, T, G, K], v [B, T, H, V], log_decay [H] or [B, T, H] of T tokens."""

    k: Tensor
    v: Tensor
    log_decay: Tensor

    def accept_(self, state: RetentionState, counts: Tensor) -> None:
        """Write the first counts[b] tokens of each sequence b."""
        mask = _first(counts, self.k.shape[1])
        retention_step_(self.k, self.k, self.v, self.log_decay, state.memory, mask=mask)
        state.position.add_(counts)


@dataclass
class Mamba2Rows:
    """Those of its recurrence, as retention's, and inputs [B, T, C] of the short convolution."""

    k: Tensor
    v: Tensor
    log_decay: Tensor
    inputs: Tensor

    def accept_(self, state: Mamba2State, counts: Tensor) -> None:
        """Write the first counts[b] tokens of each sequence b."""
        mask = _first(counts, self.k.shape[1])
        retention_step_(self.k, self.k, self.v, self.log_decay, state.memory, scale=1.0, mask=mask)
        _shift_(state.recent, self.inputs, counts)
        state.position.add_(counts)


@dataclass
class Mamba1Rows:
    """x, step [B, T, D] and write [B, T, N] of the scan, its rate [D, N], and inputs [B, T, D] of the convolution."""

    x: Tensor
    step: Tensor
    rate: Tensor
    write: Tensor
    inputs: Tensor

    def accept_(self, state: Mamba1State, counts: Tensor) -> None:
        """Write the first counts[b] tokens of each sequence b."""
        mask = _first(counts, self.x.shape[1])
        for t in range(self.x.shape[1]):
            token = slice(t, t + 1)
            write = self.write[:, token]
            _, new = selective_scan_step(self.x[:, token], self.step[:, token], self.rate, write, write, state.memory)
            state.memory.copy_(torch.where(mask[:, t, None, None], new, state.memory))
        _shift_(state.recent, self.inputs, counts)
        state.position.add_(counts)


@dataclass
class AttentionRows:
    """keys, values [B, T, G, K], rotated as in the cache. With T beyond the cache's capacity, rows would collide."""

    keys: Tensor
    values: Tensor

    def accept_(self, state: AttentionState, counts: Tensor) -> None:
        """Write the first counts[b] tokens of each sequence b."""
        (B, T), capacity = self.keys.shape[:2], state.keys.shape[1]
        mask = _first(counts, T).flatten()[:, None, None]
        device = counts.device
        places = (state.position[:, None] + torch.arange(T, device=device)) % capacity
        index = (torch.arange(B, device=device)[:, None] * capacity + places).flatten()
        for slots, rows in ((state.keys.flatten(0, 1), self.keys), (state.values.flatten(0, 1), self.values)):
            slots.index_copy_(0, index, torch.where(mask, rows.flatten(0, 1).to(slots.dtype), slots[index]))
        state.position.add_(counts)


def _first(counts: Tensor, num_tokens: int) -> Tensor:
    """[B, T] bool: the first counts[b] tokens of each sequence."""
    return torch.arange(num_tokens, device=counts.device) < counts[:, None]


def _shift_(recent: Tensor, inputs: Tensor, counts: Tensor) -> None:
    """Move the window [B, W - 1, C] that a convolution still reads on by counts[b] inputs."""
    spread = torch.cat([recent, inputs.to(recent.dtype)], 1)
    index = counts[:, None] + torch.arange(recent.shape[1], device=counts.device)
    recent.copy_(spread.gather(1, index[..., None].expand(-1, -1, recent.shape[2])))
