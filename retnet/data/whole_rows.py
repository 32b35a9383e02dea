"""Rows of whole documents: packed so that no document is cut, for conversations.

A document goes to the fullest row that has room for it, the longest document first (best-fit decreasing). Which
documents share a row is the same in every epoch; the order of rows differs. The end of a row is filled up with tokens
that predict nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from retnet.data.corpus import Corpus
from retnet.data.packing import PackedDataset


class WholeRows(PackedDataset):
    """As `PackedDataset`, without cutting: every document begins at position 0 of a row or after another.

    Raises ValueError also for a document longer than a row.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int | None = 0):
        super().__init__(corpus, length, seed)
        if corpus.lengths.max() > length:
            longest = int(corpus.lengths.argmax())
            raise ValueError(
                f"{corpus.describe(longest)} has {corpus.lengths[longest]} tokens; accepted: at most {length}, a row"
            )
        self._documents = best_fit(corpus.lengths.tolist(), length)
        self._rows = self._kept = len(self._documents)

    def _pieces(self, index: int, epoch: int) -> list[tuple[int, int, int, int]]:
        self._check(index)
        row, _ = self._place(index, epoch)
        documents = [] if row is None else self._documents[row]
        return [(document, 0, int(self.corpus.lengths[document]), 0) for document in documents]


def packed(
    corpus: Corpus, length: int, seed: int | None = 0, *, carry_state: bool = False, lanes: int = 1
) -> PackedDataset:
    """Rows of a corpus, arguments as for `PackedDataset`: of whole documents where the corpus asks for them, unless
    states are carried over the ends of rows.
    """
    if corpus.uncut and not carry_state:
        return WholeRows(corpus, length, seed)
    return PackedDataset(corpus, length, seed, carry_state=carry_state, lanes=lanes)


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """The documents of each row, in rows of `room` tokens."""
    rows: list[list[int]] = []
    free: list[int] = []  # sorted room of the rows that have some
    with_free: dict[int, list[int]] = {}
    for document in np.argsort(lengths, kind="stable")[::-1].tolist():
        size = lengths[document]
        at = bisect_left(free, size)
        if at == len(free):
            row, left = len(rows), room
            rows.append([])
        else:
            left = free[at]
            row = with_free[left].pop()
            if not with_free[left]:
                free.pop(at)
                del with_free[left]
        rows[row].append(document)
        if left > size:
            if left - size not in with_free:
                insort(free, left - size)
            with_free.setdefault(left - size, []).append(row)
    return rows
