"""The rows of each step, for any number of processes, and batches prepared ahead."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from retnet.data import PackedDataset, open_corpus
from retnet.train.batches import FACTS, ReadAhead, RowStream, TrainBatches, ValidBatches, collate


def steps_of(num_rows, batch_size, accumulation, num_processes, epochs=3):
    """Rows of every step, over all processes."""
    streams = []
    for process in range(num_processes):
        batches = TrainBatches(num_rows, batch_size, accumulation, process, num_processes)
        numbers = []
        for epoch in range(epochs):
            batches.epoch = epoch
            numbers += list(batches)
        assert len(numbers) == epochs * len(batches)
        streams.append(numbers)
    steps = []
    for step in range(len(streams[0]) // accumulation):
        of_step = slice(step * accumulation, (step + 1) * accumulation)
        steps.append(sorted(row for numbers in streams for batch in numbers[of_step] for row in batch))
    return steps


@pytest.mark.parametrize("layout", [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)])
def test_rows_of_a_step_do_not_depend_on_processes_or_accumulation(layout):
    assert steps_of(21, *layout) == steps_of(21, 8, 1, 1)
    flat = [row for step in steps_of(21, *layout) for row in step]
    assert flat == list(range(72))  # 3 epochs of 3 whole steps: every row once per epoch


def test_validation_has_every_row_once_and_equally_many_batches_per_process():
    parts = [list(ValidBatches(21, 4, process, 2)) for process in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(ValidBatches(21, 4, 0, 2)) == 3
    rows = [row for part in parts for batch in part for row in batch]
    assert sorted(row for row in rows if row >= 0) == list(range(21))
    assert rows.count(-1) == 3


def test_a_batch_knows_its_documents_and_targets(text_folder):
    rows = PackedDataset(open_corpus(text_folder).split(0.2)[0], 100, seed=3)
    stream = RowStream(rows)
    batch = collate([stream[0], stream[len(rows) + 2], stream[-1]])
    facts = batch[FACTS]
    assert facts.rows == (0, len(rows) + 2, -1)
    assert facts.num_tokens == 300
    assert facts.num_targets == (batch["shift_labels"] != -100).sum() > 150
    assert torch.equal(batch["input_ids"][1], rows.row(2, epoch=1)["input_ids"])
    lengths = batch["cu_seq_lens_q"].diff()
    assert lengths.sum() == 300
    assert (lengths <= 100).all()
    assert facts.seen == lengths.square().sum()
    assert {0, 100, 200, 300} <= set(batch["cu_seq_lens_q"].tolist())
    assert batch["begins_fresh"].all()
    assert stream.describe(len(rows) + 2) == rows.describe(2, epoch=1)


def test_batches_are_prepared_before_they_are_asked_for():
    made = threading.Semaphore(0)

    def slow():
        for number in range(6):
            made.release()
            yield number

    ahead = ReadAhead(slow(), depth=2)
    for _ in range(2):
        assert made.acquire(timeout=10)  # nothing was asked for
    assert list(ahead) == list(range(6))
    assert list(ahead) == []
    ahead.close()


def test_an_error_while_preparing_a_batch_is_raised_when_it_is_used():
    def broken():
        yield 1
        raise OSError("the file changed")

    ahead = ReadAhead(broken())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the file changed"):
        next(ahead)
    ahead.close()


def test_waiting_is_short_when_batches_are_prepared_faster_than_used():
    def quick():
        for number in range(10):
            time.sleep(0.001)
            yield number

    ahead, waited = ReadAhead(quick()), 0.0
    for _ in range(10):
        time.sleep(0.02)
        begin = time.perf_counter()
        next(ahead)
        waited += time.perf_counter() - begin
    ahead.close()
    assert waited < 0.1
