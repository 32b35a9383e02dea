"""How the tokens of one call form sequences: what every mixer needs to know besides the activations.

One `TokenLayout` is made for a call of the model and handed to all layers. Positions count real tokens, from each
document's start on and from where the states left off, so that pads, holes and packs change nothing.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from retnet.ops.rotary import Rotary, rotation


@dataclass
class TokenLayout:
    """Tokens [B, T] of N sequences: N = B rows, or N documents packed into one row.

    positions [B, T] (int64) of each real token in its sequence; lengths [N] (int64) real tokens of this call; mask [B, T]
    bool or None; cu_seqlens [N + 1] or None. `carry`: layers return their state; `in_place`: they may overwrite the
    state that they were given instead of making a new one (inference alone).
    """

    positions: Tensor
    lengths: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    carry: bool = False
    in_place: bool = False
    _rotations: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        *,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        carry: bool = False,
        in_place: bool = False,
    ) -> "TokenLayout":
        """Lay out [B, T] tokens that follow `start` [N] earlier ones of each sequence (none if None)."""
        B, T = shape
        if cu_seqlens is not None:
            steps = torch.ones(B, T, dtype=torch.long, device=device) if mask is None else mask.long()
            before = torch.cat([steps.new_zeros(1), steps[0].cumsum(0)])
            edges = before[cu_seqlens.long()]
            document = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(T, device=device), right=True)
            positions = (before[1:] - 1 - edges[document])[None]
            lengths = edges.diff()
            if start is not None:
                positions = positions + start[document]
        else:
            if mask is None:
                positions = torch.arange(T, device=device).expand(B, T)
                lengths = torch.full((B,), T, dtype=torch.long, device=device)
            else:
                positions = mask.long().cumsum(1) - 1
                lengths = mask.long().sum(1)
            if start is not None:
                positions = positions + start[:, None]
        return cls(positions.clamp_min(0), lengths, mask, cu_seqlens, carry, in_place)

    def advance(self, position: Tensor | None) -> Tensor:
        """Real tokens of each sequence [N] once this call's are counted too: a new tensor, owned by the caller."""
        return self.lengths.clone() if position is None else position + self.lengths

    def rotation(
        self, rotary: Rotary, key_dim: int, base: float, factor: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B, T, K / 2] at these positions, computed once a call for all layers."""
        key = (rotary, key_dim, base, factor, dtype)
        if key not in self._rotations:
            self._rotations[key] = rotation(self.positions, rotary, key_dim, base, factor=factor, dtype=dtype)
        return self._rotations[key]
