"""Layer states: typed values that a layer carries from one call to the next, for N sequences.

A state is passed in and returned, never hidden in a module. The first dimension of every tensor is the sequence, and
`position [N]` counts the real tokens seen. So the states of all mixers are selected, repeated, copied and stored by
the same code. The state of each mixer is in the mixer's file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from retnet.layers.token_layout import TokenLayout


def no_tokens(batch: int, device: torch.device) -> Tensor:
    """The position of `batch` sequences before their first token: zeros [N]."""
    return torch.zeros(batch, device=device, dtype=torch.int64)


@dataclass
class LayerState:
    """Base of all layer states. position [N], int64: real tokens seen by each sequence.

    PER_TOKEN: fields [N, capacity, ...] with an entry per token; () for a state of constant size.
    """

    PER_TOKEN: ClassVar[tuple[str, ...]] = ()

    position: Tensor

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        return cls(**tensors)

    @classmethod
    def after(cls, state: Self | None, layout: TokenLayout, **tensors: Tensor | None) -> Self:
        """The state after this call's tokens: `state` itself if its tensors were overwritten in place."""
        if state is not None and all(getattr(state, name) is x for name, x in tensors.items()):
            state.position.add_(layout.lengths)
            return state
        return cls(layout.advance(None if state is None else state.position), **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def replaced(self, tensors: Mapping[str, Tensor]) -> Self:
        """The state with these tensors in the place of its own, by the names of `tensors`."""
        return replace(self, **tensors)

    @property
    def per_token(self) -> tuple[str, ...]:
        """The names of the tensors with an entry per token."""
        return self.PER_TOKEN

    @property
    def leaves(self) -> "tuple[LayerState, ...]":
        """The states that hold the tensors: this one, or those inside it."""
        return (self,)

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def select(self, index: Tensor) -> Self:
        """The states of sequences `index` [M], in that order, repetitions allowed (beams, forks)."""
        return replace(self, **{name: x.index_select(0, index) for name, x in self.tensors().items()})

    def repeat(self, times: int) -> Self:
        """Each sequence `times` times in a row: N -> N * times."""
        return self.select(torch.arange(len(self.position), device=self.position.device).repeat_interleave(times))

    def clone(self) -> Self:
        """A copy to roll back to, which later in-place updates do not change."""
        return replace(self, **{name: x.clone() for name, x in self.tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()})

    def slot(self, index: int) -> Self:
        """The state of one sequence as a view: in-place updates of it change this state."""
        return replace(self, **{name: x[index : index + 1] for name, x in self.tensors().items()})

    def write_(self, index: int, state: "LayerState") -> None:
        """Overwrite sequence `index` with the state of one sequence, whatever was there before."""
        for name, x in state.tensors().items():
            getattr(self, name)[index].copy_(x[0])

    def clear_(self, index: int) -> None:
        """Reset sequence `index` to the state before its first token."""
        for x in self.tensors().values():
            x[index].zero_()

    def trim(self) -> Self:
        """The state without unused capacity, to keep or to store."""
        return self


@dataclass
class TokenCache(LayerState):
    """Base of states with an entry per token, such as a KV cache: tensors [N, capacity, ...].

    Only real tokens are kept; position p is in slot p % capacity. A cache without a window grows in geometric steps
    before it would wrap around. A cache with a window grows up to the window and is a ring from then on. In-place steps
    add a token at constant cost; others copy the cache. filled: an upper bound of the tokens of every sequence, known
    without waiting for the device (None: not known).
    """

    GROWTH: ClassVar[float] = 1.5

    filled: int | None = field(default=None, kw_only=True)

    @classmethod
    def append(
        cls,
        state: Self | None,
        tokens: dict[str, Tensor],
        layout: TokenLayout,
        window: int | None = None,
        limit: int | None = None,
        **others: Tensor,
    ) -> Self:
        """The cache with this call's tokens [B, T, ...] of each PER_TOKEN field; in place if the layout allows it.

        limit: tokens that a sequence may have; more raise ValueError.
        others: new values of the other fields. A mask is supported for one token per row; longer masked calls come here
        packed (`TokenLayout.on_real_tokens`).
        """
        if state is None:
            zero = layout.lengths.new_zeros(len(layout.lengths))
            none = {name: x.new_zeros(len(zero), 0, *x.shape[2:]) for name, x in tokens.items()}
            state = cls(zero, **none, **others, filled=0)
        longest = layout.longest
        roomy = state.reserve(longest, window, limit)
        end, capacity = state.position + layout.lengths, roomy._capacity
        index = layout.shared(
            ("slots", capacity),
            lambda: (layout.sequences * capacity + layout.positions % max(1, capacity)).flatten(),
        )
        kept: Tensor | slice = slice(None)
        if longest > capacity:  # a ring keeps the last tokens of each sequence
            kept = (layout.positions >= end[layout.sequences] - capacity).flatten().nonzero()[:, 0]
            index = index[kept]
        in_place = layout.in_place and roomy is state
        changed = dict(others)
        for name, x in tokens.items():
            slots, x = getattr(roomy, name).flatten(0, 1), x.flatten(0, 1)[kept].to(getattr(roomy, name).dtype)
            if layout.mask is not None:
                real = layout.mask.flatten().view(-1, *[1] * (x.dim() - 1))
                x = torch.where(real, x, slots[index])
            slots = slots.index_copy_(0, index, x) if in_place else slots.index_copy(0, index, x)
            changed[name] = slots.unflatten(0, (len(end), capacity))
        if in_place:
            for name, x in others.items():
                if getattr(state, name) is not x:
                    getattr(state, name).copy_(x)
            state.position.add_(layout.lengths)
            state.filled = state.bound + longest
            return state
        return replace(state, position=end, filled=roomy.bound + longest, **changed)

    def slot_positions(self, layout: TokenLayout | None = None) -> Tensor:
        """The position of the token in each slot [N, capacity]; negative in empty slots.

        With the layout of the newest tokens, computed once for all layers whose caches have this capacity.
        """
        if layout is not None:
            return layout.shared(("slot_positions", self._capacity), self.slot_positions)
        newest = self.position[:, None] - 1
        return newest - (newest - torch.arange(self._capacity, device=newest.device)) % max(1, self._capacity)

    def reserve(self, num_tokens: int, window: int | None = None, limit: int | None = None) -> Self:
        """The cache with room for `num_tokens` more per sequence, so that adding them moves no memory (CUDA graphs)."""
        capacity = self._capacity
        if capacity == window or self.bound + num_tokens <= capacity:
            return self
        needed = self.exact_bound() + num_tokens
        if needed <= capacity:
            return self
        if limit is not None and needed > limit:
            raise ValueError(context_error(needed, limit))
        grown = min(x for x in (max(needed, int(capacity * self.GROWTH)), window, limit) if x is not None)
        roomy = {}
        for name in self.PER_TOKEN:
            x: Tensor = getattr(self, name)
            roomy[name] = torch.cat([x, x.new_zeros(len(x), grown - capacity, *x.shape[2:])], 1)
        return replace(self, position=self.position.clone(), **roomy)

    def slot(self, index: int) -> Self:
        return replace(super().slot(index), filled=None)

    def write_(self, index: int, state: "LayerState") -> None:
        """As `LayerState.write_`; tokens move to their slots in this cache. Raises ValueError if they do not fit."""
        assert isinstance(state, TokenCache)
        kept, capacity = state.slot_positions()[0], self._capacity
        kept, source = kept[kept >= 0], (kept >= 0).nonzero()[:, 0]
        if len(kept) > capacity:
            raise ValueError(f"the state keeps {len(kept)} tokens; accepted here: at most {capacity}")
        self.clear_(index)
        for name, x in state.tensors().items():
            if name in self.PER_TOKEN:
                getattr(self, name)[index].index_copy_(
                    0, kept % max(1, capacity), x[0, source].to(getattr(self, name).dtype)
                )
            else:
                getattr(self, name)[index].copy_(x[0])
        self.filled = None

    def trim(self) -> Self:
        used = min(self._capacity, int(self.position.max())) if len(self.position) else 0
        return replace(self, **{name: getattr(self, name)[:, :used] for name in self.PER_TOKEN})

    @property
    def _capacity(self) -> int:
        return getattr(self, self.PER_TOKEN[0]).shape[1]

    @property
    def bound(self) -> int:
        """An upper bound of the tokens of every sequence."""
        return self.exact_bound() if self.filled is None else self.filled

    def exact_bound(self) -> int:
        """The tokens of the longest sequence, from the device; `filled` counts pads too."""
        self.filled = int(self.position.max()) if len(self.position) else 0
        return self.filled


def context_error(tokens: int, limit: int) -> str:
    return f"a sequence has {tokens} tokens; accepted by this layer: at most {limit} (max_context)"
