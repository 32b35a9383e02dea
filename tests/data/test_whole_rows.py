"""Rows of whole documents."""

from __future__ import annotations

import random

import numpy as np
import pytest

from retnet.data import IGNORED, PackedDataset
from retnet.data.mixture import Mixture
from retnet.data.whole_rows import WholeRows, best_fit, packed


class Lengths:
    """A corpus of documents 256 1 2 3 ..., of which even tokens are learned."""

    uncut, name, document_start, vocab_size, tokenizer_id, num_bytes = True, "lengths", 256, 2000, "test", 99

    def __init__(self, lengths):
        self.lengths = np.array(lengths, dtype=np.int64)
        self.num_targets = self.num_tokens = int(self.lengths.sum())

    def __len__(self):
        return len(self.lengths)

    def tokens(self, document, start=0, stop=None):
        return np.array([256, *range(1, self.lengths[document])], dtype=np.uint16)[start:stop]

    def learned(self, document, start=0, stop=None):
        return (np.arange(self.lengths[document]) % 2 == 0)[start:stop]

    def describe(self, document):
        return f"document {document}"


@pytest.mark.parametrize("seed", range(5))
def test_every_document_is_in_one_row_and_rows_are_nearly_full(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 50) for _ in range(400)]
    rows = best_fit(lengths, 64)
    assert sorted(document for row in rows for document in row) == list(range(400))
    sizes = [sum(lengths[document] for document in row) for row in rows]
    assert max(sizes) <= 64
    assert len(rows) <= 1.05 * sum(lengths) / 64 + 1


def test_documents_of_a_row_do_not_see_each_other_and_only_learned_tokens_are_targets():
    corpus = Lengths([5, 3, 8, 2])
    rows = WholeRows(corpus, 9, seed=None)
    seen = []
    for index in range(len(rows)):
        row = rows.row(index)
        starts = [i for i, position in enumerate(row["position_ids"].tolist()) if position == 0]
        for begin, end in zip(starts, [*starts[1:], 9]):
            ids, targets = (row[key][begin:end].tolist() for key in ("input_ids", "shift_labels"))
            if len(set(ids)) == 1 and begin:  # what fills the row up
                assert set(targets) == {IGNORED}
                continue
            seen.append(len(ids))
            assert ids == [256, *range(1, len(ids))]
            assert targets == [t if t % 2 == 0 else IGNORED for t in range(1, len(ids))] + [IGNORED]
            assert row["labels"][begin:end].tolist() == [IGNORED, *targets[:-1]]
    assert sorted(seen) == [2, 3, 5, 8]


def test_epochs_hold_the_same_rows_in_another_order():
    rows = WholeRows(Lengths([7] * 30), 10, seed=1)
    assert rows.describe(0) == [rows.describe(0)[0]]
    epochs = [[tuple(rows.describe(i, epoch)) for i in range(len(rows))] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"document 1 has 12 tokens; accepted: at most 10, a row"):
        WholeRows(Lengths([3, 12]), 10)


def test_documents_are_kept_whole_where_the_corpus_asks_for_it_and_states_are_not_carried():
    corpus = Lengths([5, 4, 7])
    assert type(packed(corpus, 8)) is WholeRows
    assert type(packed(corpus, 8, carry_state=True)) is PackedDataset
    mixture = Mixture([corpus, Lengths([3, 3])], [1, 1], 8)
    assert [type(part) for part in mixture.parts] == [WholeRows, WholeRows]
