"""Batches of training and validation rows, prepared ahead of the step that uses them.

The rows of all epochs form one stream: row g is row `g % len` of epoch `g // len`. Batch b, over all processes, is rows
[b G, (b + 1) G) of the stream, and process p takes the p-th part of it. A batch is therefore known from its number:
resuming skips nothing, no row is repeated to fill an epoch, and the rows of a step depend only on the product of batch
size, accumulation steps and processes. With carried states, row b of every batch belongs to lane b.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from retnet.data import IGNORED, Rows

FACTS = "facts"
_END = object()


@dataclass(frozen=True)
class BatchFacts:
    """Facts about a batch, on the host.

    rows: their numbers in the stream; -1 for a row that fills up a validation batch.
    num_targets: tokens that are predicted.
    seen: the sum of the squared lengths of the document pieces, about twice the pairs that causal attention scores.
    num_tokens: all tokens, targets or not.
    """

    rows: tuple[int, ...]
    num_targets: int
    seen: int
    num_tokens: int


class RowStream(Dataset[dict[str, Any]]):
    """Rows of all epochs, by their number in the stream. Row -1 has no targets."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number < 0:
            row = self.rows.row(0)
            ignored = torch.full_like(row["labels"], IGNORED)
            return {**row, "labels": ignored, "shift_labels": ignored, "number": number}
        epoch, index = divmod(number, len(self.rows))
        return {**self.rows.row(index, epoch), "number": number}

    def describe(self, number: int) -> list[str]:
        """The documents of a row."""
        epoch, index = divmod(number, len(self.rows))
        return self.rows.describe(index, epoch)


class TrainBatches(Sampler[list[int]]):
    """The batches of one process in one epoch. `epoch` must be set before the epoch begins.

    An epoch is rounded up to whole optimizer steps, and the next one continues after its last row.
    """

    def __init__(self, num_rows: int, batch_size: int, accumulation: int, process: int = 0, num_processes: int = 1):
        self.epoch = 0
        self._batch_size, self._process, self._num_processes = batch_size, process, num_processes
        rows_per_step = batch_size * accumulation * num_processes
        self._batches = accumulation * -(-num_rows // rows_per_step)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.epoch * self._batches, (self.epoch + 1) * self._batches):
            first = (batch * self._num_processes + self._process) * self._batch_size
            yield list(range(first, first + self._batch_size))


class ValidBatches(Sampler[list[int]]):
    """Every row of an epoch once, in order. All processes have the same number of batches, filled up with row -1."""

    def __init__(self, num_rows: int, batch_size: int, process: int = 0, num_processes: int = 1):
        self._num_rows, self._batch_size = num_rows, batch_size
        self._process, self._num_processes = process, num_processes

    def __len__(self) -> int:
        return -(-self._num_rows // (self._batch_size * self._num_processes))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self._num_processes + self._process) * self._batch_size
            yield [row if row < self._num_rows else -1 for row in range(first, first + self._batch_size)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as a batch for `PackedForCausalLM`. Document boundaries are computed here, without a device synchronisation.

    input_ids, labels, shift_labels [B, T]; cu_seq_lens_q [N + 1]; begins_fresh [B]: whether a row starts from an empty
    state, not from its lane's; `FACTS`.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels", "shift_labels")}
    positions = torch.stack([row["position_ids"] for row in rows])
    starts = positions == 0
    begins_fresh = starts[:, 0].clone()
    starts[:, 0] = True
    bounds = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([starts.numel()])])
    facts = BatchFacts(
        rows=tuple(row["number"] for row in rows),
        num_targets=int((batch["shift_labels"] != IGNORED).sum()),
        seen=int(bounds.diff().square().sum()),
        num_tokens=starts.numel(),
    )
    return {**batch, "cu_seq_lens_q": bounds, "begins_fresh": begins_fresh, FACTS: facts}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device, copied asynchronously."""
    return {k: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for k, x in batch.items()}


class ReadAhead:
    """An iterator that prepares the next `depth` items in a thread while the current one is used."""

    def __init__(self, source: Iterator[Any], depth: int = 2):
        self._source = source
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._waiting: deque[Future[Any]] = deque()
        for _ in range(depth):
            self._ask()

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> Any:
        item = self._waiting.popleft().result()
        if item is _END:
            self._waiting.append(self._pool.submit(lambda: _END))
            raise StopIteration
        self._ask()
        return item

    def close(self) -> None:
        """Prepare no more items, after the one in preparation is finished."""
        self._pool.shutdown(cancel_futures=True)

    def _ask(self) -> None:
        self._waiting.append(self._pool.submit(next, self._source, _END))
