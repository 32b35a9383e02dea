"""Packing: documents end to end, cut into rows of T tokens that keep the document boundaries.

An epoch is a stream: every document once, in an order drawn from (seed, epoch). Row r holds the stream's tokens
[r T, (r + 1) T) and, for each, the token that follows it in its document. So every token is read once, and every token
but the document starts is predicted once: the sum of losses over `num_bytes` gives exact bits per byte. Rows are full
(only the last of an epoch is filled up), so every batch has one shape and none of it is padding. A row is computed from
its number alone, so a run resumes anywhere without reading earlier rows.

By default the part of a document in the next row starts there with a fresh state, and rows are shuffled. With
`carry_state` rows come in lanes for truncated backpropagation: row b of a batch continues row b of the batch before,
and the trainer carries the state over unless `position_ids` begins with 0.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from retnet.data.corpus import Corpus
from retnet.data.shuffle import make_key, permute

IGNORED = -100


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens: the interface of `PackedDataset` and `Mixture` for a trainer.

    `len` is the number of rows per epoch. Item i of an epoch is `row(i, epoch)`. Indexing reads the epoch set by
    `set_epoch`, which accelerate's loaders call; it reaches workers that are already running.

    num_bytes: bytes of text in all rows of an epoch.
    bytes_per_target: bytes of text per predicted token; bits per byte are nats per token / ln 2 / bytes_per_target.

    A row is a dict of int64 tensors [T]:
        input_ids: the tokens.
        shift_labels: the next token in the same document, also across the end of a row; -100 at a document's last
            token, before tokens that are not learned, and where the epoch is filled up. Transformers' loss and ours
            take them without shifting.
        labels: the same unshifted, as Hugging Face models expect; -100 at the first token of each piece. With these
            alone the last token of a row predicts nothing.
        position_ids: tokens since the last fresh state; 0 is a boundary.
    """

    length: int
    num_bytes: int
    bytes_per_target: float

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int, epoch: int = 0) -> dict[str, Tensor]:
        """input_ids, labels, shift_labels and position_ids [T] (int64) of a row of an epoch."""
        """Row `index` of an epoch. Raises IndexError outside [0, len)."""

    @abstractmethod
    def describe(self, index: int, epoch: int = 0) -> list[str]:
        """The documents of a row: the origin of each, and its tokens in the row."""

    @property
    def epoch(self) -> int:
        """The epoch that indexing reads."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that indexing reads."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(index, self.epoch)

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")


class PackedDataset(Rows):
    """Rows of one corpus; the same corpus, length, seed and epoch give the same rows everywhere.

    corpus: the documents to pack.
    length: T, tokens per row, at least 2.
    seed: of the order of documents and rows, which differs by epoch; None keeps the given order.
    carry_state: documents continue from row to row of a lane.
    lanes: with carry_state, rows per batch over all processes: item i is step i // lanes of lane i % lanes. Read in
        order, batches of B on each of P processes (lanes = B P) give process p the lanes [p B, (p + 1) B) every time.

    Raises ValueError if there are no documents, the length is below 2, or there are fewer rows than lanes.
    """

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        seed: int | None = 0,
        *,
        carry_state: bool = False,
        lanes: int = 1,
    ):
        super().__init__()
        if length < 2:
            raise ValueError(f"length is {length}; accepted: at least 2 tokens per row, to predict one")
        if not corpus.num_targets:
            raise ValueError("there are no documents to pack; accepted: at least one")
        self.corpus, self.length, self.seed = corpus, length, seed
        self.carry_state, self.lanes = carry_state, lanes if carry_state else 1
        self.num_bytes = corpus.num_bytes
        self.bytes_per_target = corpus.num_bytes / corpus.num_targets
        self._rows = -(-corpus.num_tokens // length)
        if not 1 <= self.lanes <= self._rows:
            raise ValueError(
                f"{corpus.name} has {self._rows} rows of {length} tokens, too few for {lanes} lanes; accepted: a lane "
                "or more, each with at least one row"
            )
        self._ordered: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._kept = self._rows

    def __len__(self) -> int:
        return self.lanes * -(-self._kept // self.lanes)

    def sample(self, most_rows: int) -> None:
        """Keep at most this many rows, spread evenly over all, whose order is the given one (seed None).

        `num_bytes` becomes that of their targets: exact for bytes, an estimate for tokens of several bytes. Raises
        ValueError for rows in a random order or with carry_state, and for no rows.
        """
        if self.seed is not None or self.carry_state or most_rows < 1:
            raise ValueError(f"most_rows is {most_rows}; accepted: 1 or more, with seed None and without carry_state")
        if most_rows < self._rows:
            self._kept = most_rows
            targets = sum(int((self.row(i)["shift_labels"] != IGNORED).sum()) for i in range(most_rows))
            self.num_bytes = max(1, round(self.bytes_per_target * targets))

    def row(self, index: int, epoch: int = 0) -> dict[str, Tensor]:
        input_ids = np.full(self.length, self.corpus.document_start, dtype=np.int64)
        shift_labels = np.full(self.length, IGNORED, dtype=np.int64)
        position_ids = np.zeros(self.length, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        filled = 0
        for document, begin, size, position in self._pieces(index, epoch):
            end = filled + size
            stop = min(begin + size + 1, int(self.corpus.lengths[document]))
            tokens = self.corpus.tokens(document, begin, stop)
            targets = np.where(self.corpus.learned(document, begin, stop), tokens.astype(np.int64), IGNORED)
            input_ids[filled:end] = tokens[:size]
            shift_labels[filled : filled + len(tokens) - 1] = targets[1:]
            labels[filled + 1 : end] = targets[1:size]
            position_ids[filled:end] = np.arange(position, position + size)
            filled = end
        position_ids[filled:] = np.arange(self.length - filled)
        arrays = {
            "input_ids": input_ids,
            "shift_labels": shift_labels,
            "labels": labels,
            "position_ids": position_ids,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def describe(self, index: int, epoch: int = 0) -> list[str]:
        return [
            f"{self.corpus.describe(document)}, tokens {begin} to {begin + size} of {self.corpus.lengths[document]}"
            for document, begin, size, _ in self._pieces(index, epoch)
        ]

    def _pieces(self, index: int, epoch: int) -> list[tuple[int, int, int, int]]:
        """The pieces of a row: document, its first token in the row, number of tokens, position of the first."""
        self._check(index)
        row, first_of_lane = self._place(index, epoch)
        if row is None:
            return []
        documents, ends = self._order(epoch)
        at, stop = row * self.length, min((row + 1) * self.length, int(ends[-1]))
        fresh = (row if first_of_lane is None else first_of_lane) * self.length
        pieces = []
        slot = int(np.searchsorted(ends, at, side="right"))
        while at < stop:
            document = int(documents[slot])
            origin = int(ends[slot] - self.corpus.lengths[document])
            size = min(stop, int(ends[slot])) - at
            pieces.append((document, at - origin, size, at - max(origin, fresh)))
            at += size
            slot += 1
        return pieces

    def _place(self, index: int, epoch: int) -> tuple[int | None, int | None]:
        """The row of the stream for an index, and the first row of its lane.

        Lane lengths differ by at most one row; there is no row (None) for a lane that ended before the others.
        """
        if not self.carry_state:
            if self.seed is None:
                return index * self._rows // self._kept, None
            return int(permute(index, self._rows, make_key("rows", self.seed, epoch))), None
        step, lane = divmod(index, self.lanes)
        first, last = (self._rows * bound // self.lanes for bound in (lane, lane + 1))
        return (first + step if first + step < last else None), first

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents of an epoch's stream, and the end of each in it."""
        if self._ordered is None or (self.seed is not None and self._ordered[0] != epoch):
            documents = np.arange(len(self.corpus))
            if self.seed is not None:
                documents = permute(documents, len(self.corpus), make_key("documents", self.seed, epoch))
            self._ordered = epoch, documents, np.cumsum(self.corpus.lengths[documents])
        return self._ordered[1:]
