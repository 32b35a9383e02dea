"""Draft updates for speculative decoding: the state updates of tokens that may yet be rejected.

The state stays as it was before the draft. Only accepted tokens are written, by the operator that decodes them one by
one. This costs O(T (K + V)) per head and is exact; a copy of the state per token would cost T K V.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Draft:
    """Base of the draft updates of one layer: tensors of T tokens of each sequence."""

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if x is not None)

    def accept_(self, state: Any, counts: Tensor) -> None:
        """Write the first counts[b] tokens of each sequence b into the state before them, in place."""
        self._write_(state, counts)
        state.position.add_(counts)

    def _write_(self, state: Any, counts: Tensor) -> None:
        """`accept_` without the position."""
        raise NotImplementedError


def accepted(counts: Tensor, num_tokens: int) -> Tensor:
    """[B, T] bool: the first counts[b] tokens of each sequence b."""
    return torch.arange(num_tokens, device=counts.device) < counts[:, None]
