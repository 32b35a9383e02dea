"""Masked and packed batches as blocks of whole sequences, for code that computes one block at a time.

A token whose mask is False neither decays nor writes, so dropping it from its sequence changes nothing for the others:
`Compaction` gathers the real tokens of every sequence into one packed row and scatters results back. The cost is linear
in the number of tokens, and a fixed decay stays fixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compaction:
    """The real tokens of a [B, T] batch: their flat positions [R] and the sequences' bounds [N + 1] among them."""

    tokens: Tensor
    cu_seqlens: Tensor
    bounds: list[int]
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor | None) -> "Compaction":
        num_rows, num_tokens = mask.shape
        before = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.flatten().long().cumsum(0)])
        if cu_seqlens is None:
            edges = torch.arange(num_rows + 1, device=mask.device) * num_tokens
        else:
            edges = cu_seqlens.long()
        bounds = before[edges]
        return cls(mask.flatten().nonzero()[:, 0], bounds, bounds.tolist(), (num_rows, num_tokens))

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, R, ...]."""
        return x.flatten(0, 1).index_select(0, self.tokens)[None]

    def scatter(self, x: Tensor) -> Tensor:
        """[1, R, ...] -> [B, T, ...], 0 where the mask is False."""
        full = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return full.index_copy_(0, self.tokens, x[0]).unflatten(0, self.shape)


def equal_blocks(num_rows: int, num_tokens: int, bounds: list[int] | None) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a batch into blocks of sequences of one length: (rows, tokens, sequences) to slice inputs and states with.

    Without bounds all rows are one block; a packed row gives one block per sequence, empty ones included.
    """
    if bounds is None:
        yield slice(0, num_rows), slice(0, num_tokens), slice(0, num_rows)
        return
    for n, (start, end) in enumerate(pairwise(bounds)):
        yield slice(0, 1), slice(start, end), slice(n, n + 1)
