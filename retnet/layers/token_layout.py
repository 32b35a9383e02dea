"""Token layout: positions, masks and document boundaries of the tokens of one call.

One `TokenLayout` is made per call of the model and given to all layers. Positions count real tokens from the start of
each document, or from the position of its state, so that padding, masked tokens and packing change no result.
"""

from collections.abc import Callable, Hashable
from copy import copy
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from retnet.ops.context_shard import ContextShard
from retnet.ops.ragged import Compaction

Value = TypeVar("Value")
State = TypeVar("State")


class TokenLayout:
    """Tokens [B, T] of N sequences: N = B rows, or N documents packed into one row.

    positions [B, T] (int64) of each real token in its sequence; lengths [N] (int64) real tokens of this call; mask
    [B, T] bool or None; cu_seqlens [N + 1] or None. `carry`: layers return their state. `in_place`: layers may
    overwrite the given state (inference only). `losses`: a list to which layers add losses of their own (MoE routers).
    `deferred`: layers leave the state as it is and return a draft in its place (`layers/draft.py`). `context`: the
    tokens are this process's shard of longer rows, and layers exchange what crosses its borders. `recompute`:
    a level of `layers/recompute.py` below "layer", which blocks carry out.

    Not a dataclass: FSDP rebuilds those among the arguments of a block, with a copy of `losses`, to which the block's
    losses would go and be lost, and with positions and rotary angles in the dtype of mixed precision.
    """

    def __init__(
        self,
        positions: Tensor,
        lengths: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        carry: bool = False,
        in_place: bool = False,
        losses: list[Tensor] | None = None,
        deferred: bool = False,
        context: ContextShard | None = None,
        recompute: Literal["none", "light", "medium"] = "none",
    ):
        self.positions, self.lengths, self.mask, self.cu_seqlens = positions, lengths, mask, cu_seqlens
        self.carry, self.in_place, self.losses, self.deferred = carry, in_place, losses, deferred
        self.context: ContextShard | None = context
        self.recompute: Literal["none", "light", "medium"] = recompute
        self._shared: dict[Hashable, Any] = {}

    def with_losses(self, losses: list[Tensor] | None) -> "TokenLayout":
        """This layout with another list of losses; what is computed once per call is still shared."""
        other = copy(self)
        other.losses = losses
        return other

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
        losses: list[Tensor] | None = None,
        deferred: bool = False,
        context: ContextShard | None = None,
        recompute: Literal["none", "light", "medium"] = "none",
    ) -> "TokenLayout":
        """The layout of [B, T] tokens after `start` [N] earlier tokens of each sequence (None: no earlier tokens)."""
        B, T = shape
        if cu_seqlens is not None:
            steps = torch.ones(B, T, dtype=torch.long, device=device) if mask is None else mask.long()
            before = torch.cat([steps.new_zeros(1), steps[0].cumsum(0)])
            edges = before[cu_seqlens.long()]
            document = documents_of(cu_seqlens, T)
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
        positions = positions.clamp_min(0)
        return cls(positions, lengths, mask, cu_seqlens, carry, in_place, losses, deferred, context, recompute)

    def advance(self, position: Tensor | None) -> Tensor:
        """Real tokens of each sequence [N] after this call, in a new tensor."""
        return self.lengths.clone() if position is None else position + self.lengths

    @property
    def one_per_row(self) -> bool:
        """Whether each row holds one token and is one sequence, as in a decode step."""
        return self.positions.shape[1] == 1 and self.cu_seqlens is None

    def must_pack(self, state: object | None) -> bool:
        """Whether a layer that reads the mask in decode steps alone has to run `on_real_tokens` here."""
        return self.mask is not None and not (self.one_per_row and state is not None)

    @property
    def sequences(self) -> Tensor:
        """Which of the N sequences each token [B, T] belongs to."""
        B, T = self.positions.shape
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is not None:
            return self.shared("sequences", lambda: documents_of(cu_seqlens, T)[None])
        return torch.arange(B, device=self.positions.device)[:, None].expand(B, T)

    def first_seen(self, window: int | None) -> Tensor:
        """The first place in its row that each token [B, T] may attend to: the start of its document or window.

        On a shard, places are those of the whole row.
        """
        B, T = self.positions.shape
        places = torch.arange(T, device=self.positions.device).expand(B, T)
        if self.context is not None:
            places = places + self.context.rank * self.context.tokens
            first = places - self.positions
            return first if window is None else first.maximum(places - window + 1)
        first = torch.zeros_like(places) if self.cu_seqlens is None else self.cu_seqlens.long()[self.sequences]
        return first if window is None else first.maximum(places - window + 1)

    @property
    def bounds(self) -> list[int] | None:
        """cu_seqlens as Python integers, or None. Waits for a GPU, once per call."""
        return None if self.cu_seqlens is None else self.shared("bounds", self.cu_seqlens.tolist)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in this call, pads included."""
        if self.bounds is None:
            return self.positions.shape[1]
        return max((end - start for start, end in pairwise(self.bounds)), default=0)

    def on_real_tokens(
        self, layer: Callable[[Tensor, State, "TokenLayout"], tuple[Tensor, State]], x: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """Run a layer that cannot mask: it sees the real tokens packed into one row. y is 0 at masked tokens."""
        mask = self.mask
        if mask is None:
            return layer(x, state, self)
        compaction, dense = self.shared("real_tokens", lambda: self._real_tokens(mask))
        y, state = layer(compaction.gather(x), state, dense.with_losses(self.losses))
        return compaction.scatter(y), state

    def _real_tokens(self, mask: Tensor) -> "tuple[Compaction, TokenLayout]":
        compaction = Compaction.of(mask, self.cu_seqlens)
        bounds = torch.tensor(compaction.bounds, device=mask.device)
        positions = compaction.gather(self.positions)
        dense = TokenLayout(positions, self.lengths, None, bounds, self.carry, self.in_place)
        return compaction, dense

    def shared(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """make(), computed once per call for all layers."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def documents_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The document of each token [T] of a packed row, from bounds [N + 1]."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
