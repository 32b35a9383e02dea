"""Layer states as typed values: what a layer carries from one call to the next, for N sequences.

A state is passed in and returned, never hidden in a module. Every tensor has the sequence as its first dimension, and
`position [N]` counts the real tokens seen, so that states can be selected, repeated, copied and stored alike whatever
the mixer.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass
class LayerState:
    """Base of all layer states. position [N], int64: real tokens seen by each sequence."""

    position: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by field name; enough, with the class, to build it again."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def select(self, index: Tensor) -> Self:
        """The states of sequences `index` [M], in that order, repetitions allowed (beams, forks)."""
        return replace(self, **{name: x.index_select(0, index) for name, x in self.tensors().items()})

    def repeat(self, times: int) -> Self:
        """Every sequence `times` times in a row: N -> N times."""
        return self.select(torch.arange(len(self.position), device=self.position.device).repeat_interleave(times))

    def clone(self) -> Self:
        """A copy that later in-place updates leave alone: a checkpoint to roll back to."""
        return replace(self, **{name: x.clone() for name, x in self.tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()})


@dataclass
class RetentionState(LayerState):
    """memory [N, H, K, V]: the sum of decayed k^T v over all tokens seen; float32 unless a narrower one was asked for."""

    memory: Tensor
