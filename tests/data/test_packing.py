from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retnet.data import DOCUMENT_START, IGNORED, ByteTokenizer, Document, PackedDataset


class InMemory(Document):
    """A document whose bytes tell document and position apart."""

    def read(self, start=0, length=None):
        data = bytes((31 * int(self.name) + 7 * i) % 256 for i in range(self.size))
        return data[start : self.size if length is None else start + length]


def documents(sizes):
    return [InMemory(str(i), Path(), size) for i, size in enumerate(sizes)]


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12)
lengths = st.integers(2, 40)


@given(sizes, lengths)
def test_every_byte_is_predicted_exactly_once_and_in_order(sizes, length):
    docs = documents(sizes)
    rows = PackedDataset(docs, length, seed=None)
    predicted = [int(t) for i in range(len(rows)) for t in rows[i]["labels"] if t != IGNORED]
    assert bytes(predicted) == b"".join(d.read() for d in docs)


@given(sizes, lengths)
def test_pieces_start_fresh_with_the_token_before_them_as_context(sizes, length):
    docs = documents(sizes)
    rows = PackedDataset(docs, length, seed=None)
    tokens = {d.name: ByteTokenizer().encode(d.read()).tolist() for d in docs}
    stream = iter(docs)
    document, cursor = next(stream), 0
    for i in range(len(rows)):
        row = rows[i]
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist() + [length]
        for begin, end in pairwise(starts):
            piece = row["input_ids"][begin:end].tolist()
            assert row["position_ids"][begin:end].tolist() == list(range(end - begin))
            assert row["labels"][begin] == IGNORED
            if document is None:  # the filling of the last row
                assert i == len(rows) - 1
                assert set(row["labels"][begin:end].tolist()) == {IGNORED}
                continue
            assert piece == tokens[document.name][cursor : cursor + len(piece)]
            cursor += len(piece) - 1
            if cursor == document.size:
                document, cursor = next(stream, None), 0
    assert document is None


@given(sizes, lengths, st.integers(0, 3))
def test_the_same_seed_gives_the_same_rows(sizes, length, seed):
    first, second = (PackedDataset(documents(sizes), length, seed) for _ in range(2))
    assert len(first) == len(second)
    for i in range(len(first)):
        for key, value in first[i].items():
            assert value.dtype == torch.int64
            assert value.shape == (length,)
            assert torch.equal(value, second[i][key])


def test_another_seed_orders_the_documents_differently():
    names = [[d.name for d in PackedDataset(documents([5] * 20), 8, seed).documents] for seed in (0, 1)]
    assert names[0] != names[1]
    assert sorted(names[0]) == sorted(names[1])


def test_rows_hold_several_documents_and_begin_them_with_the_document_start():
    rows = PackedDataset(documents([3, 3]), 8, seed=None)
    assert len(rows) == 1
    assert (rows[0]["input_ids"] == DOCUMENT_START).nonzero().flatten().tolist() == [0, 4]
    assert rows[0]["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_loader_can_stack_and_shuffle_rows():
    rows = PackedDataset(documents([50, 7, 90]), 16)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
    assert {batch["input_ids"].shape[1] for batch in loader} == {16}


def test_bad_arguments_say_what_was_given():
    with pytest.raises(ValueError, match="at least 2 tokens to predict one, got length 1"):
        PackedDataset(documents([3]), 1)
    with pytest.raises(ValueError, match="no documents"):
        PackedDataset([], 8)
    with pytest.raises(IndexError, match="row 1 of 1"):
        PackedDataset(documents([3]), 8)[1]
