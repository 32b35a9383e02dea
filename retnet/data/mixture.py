"""Mixtures: rows of several corpora in one stream, by their shares of the tokens.

The weights alone decide which corpus row t comes from. A table spreads each corpus evenly, so that at every point of a
run the tokens so far have the given shares, to about one row per corpus. Row t is known without the rows before it, as
in `packing`. A corpus that has been read to its end begins again, in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from retnet.data.corpus import Corpus, token_kind
from retnet.data.packing import PackedDataset, Rows
from retnet.data.shuffle import make_key
from retnet.data.whole_rows import packed

_RESOLUTION = 10_000


class Mixture(Rows):
    """Rows of several corpora.

    corpora: of one tokenizer.
    weights: each corpus's share of the tokens, up to a common factor, rounded to 1 / 10000.
    length, seed, carry_state, lanes: as for `PackedDataset`. With carry_state a lane stays with its corpus, so
        lanes x share must be an integer for each.

    An epoch has as many rows as the corpora together.

    shares: the share of each corpus.

    Raises ValueError for a weight that is not positive or rounds to nothing, corpora of different tokenizers, or
    weights that do not give whole lanes.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float],
        length: int,
        seed: int | None = 0,
        *,
        carry_state: bool = False,
        lanes: int = 1,
    ):
        super().__init__()
        _check_corpora(corpora, weights)
        self.length, self.carry_state = length, carry_state
        counts = _lane_counts(weights, lanes) if carry_state else _table_counts(weights)
        self.parts = [
            packed(
                corpus,
                length,
                None if seed is None else make_key(seed, number) >> 1,
                carry_state=carry_state,
                lanes=int(count),
            )
            for number, (corpus, count) in enumerate(zip(corpora, counts, strict=True))
        ]
        self.shares = [float(count / counts.sum()) for count in counts]
        self.num_bytes = sum(part.num_bytes for part in self.parts)
        self.bytes_per_target = sum(s * part.bytes_per_target for s, part in zip(self.shares, self.parts))
        self._counts = counts
        self._period = int(counts.sum())
        self._parts = np.repeat(np.arange(len(counts)), counts)
        if not carry_state:
            self._parts = _spread(counts)
        self._ranks = _ranks(self._parts)

    def __len__(self) -> int:
        rows = sum(len(part) for part in self.parts)
        return self._period * -(-rows // self._period) if self.carry_state else rows

    def row(self, index: int, epoch: int = 0) -> dict[str, Tensor]:
        part, index, epoch = self._place(index, epoch)
        return part.row(index, epoch)

    def describe(self, index: int, epoch: int = 0) -> list[str]:
        part, index, epoch = self._place(index, epoch)
        return part.describe(index, epoch)

    def _place(self, index: int, epoch: int) -> tuple[PackedDataset, int, int]:
        """The corpus of a row, and the row's index and epoch there.

        The table is one period of the stream: with lanes, one batch. Rows of a corpus are numbered in stream order.
        """
        self._check(index)
        period, slot = divmod(epoch * len(self) + index, self._period)
        part = int(self._parts[slot])
        number = period * int(self._counts[part]) + int(self._ranks[slot])
        return self.parts[part], number % len(self.parts[part]), number // len(self.parts[part])


def _check_corpora(corpora: Sequence[Corpus], weights: Sequence[float]) -> None:
    if not corpora or len(corpora) != len(weights):
        raise ValueError(
            f"{len(corpora)} corpora with {len(weights)} weights; accepted: one weight for each, at least one"
        )
    for corpus, weight in zip(corpora, weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of {corpus.name} is {weight}; accepted: numbers above 0")
    if len({token_kind(corpus) for corpus in corpora}) > 1:
        each = ", ".join(
            f"{c.name}: {c.tokenizer_id[:12]} of {c.vocab_size}, start {c.document_start}" for c in corpora
        )
        raise ValueError(f"corpora of different tokenizers cannot be mixed ({each}); accepted: one tokenizer for all")


def _table_counts(weights: Sequence[float]) -> NDArray[np.int64]:
    """Rows of each corpus in a period: the weights as whole numbers, by largest remainder."""
    exact = np.array(weights, dtype=np.float64) / math.fsum(weights) * _RESOLUTION
    counts = np.floor(exact + 1e-9).astype(np.int64)
    for number in np.argsort(counts - exact, kind="stable")[: _RESOLUTION - int(counts.sum())]:
        counts[number] += 1
    if not counts.all():
        raise ValueError(
            f"weights {list(weights)} give a corpus less than 1 row in {_RESOLUTION}; accepted: larger weights"
        )
    return counts // np.gcd.reduce(counts)


def _lane_counts(weights: Sequence[float], lanes: int) -> NDArray[np.int64]:
    exact = np.array(weights, dtype=np.float64) / math.fsum(weights) * lanes
    counts = np.rint(exact).astype(np.int64)
    if np.abs(counts - exact).max() > 1e-6 * lanes or not counts.all():
        given = ", ".join(f"{x:.4g}" for x in exact)
        raise ValueError(
            f"weights {list(weights)} give {given} of {lanes} lanes; accepted with carry_state, where a lane stays "
            "with its corpus: weights that give every corpus whole lanes"
        )
    return counts


def _spread(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Part of each slot of a period: the j-th of a part's c rows is near (j + 1/2) / c of the period."""
    parts = np.repeat(np.arange(len(counts)), counts)
    times = (_ranks(parts) + 0.5) / counts[parts]
    return parts[np.argsort(times, kind="stable")]


def _ranks(parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many earlier slots belong to the same part, for each slot."""
    ranks = np.empty(len(parts), dtype=np.int64)
    for part in np.unique(parts):
        ranks[parts == part] = np.arange(int((parts == part).sum()))
    return ranks
