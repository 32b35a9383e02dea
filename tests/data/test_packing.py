from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data import IGNORED, ByteCorpus, PackedDataset, find_documents
from retnet.data.whole_rows import WholeRows

few = settings(max_examples=40)
sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12)
lengths = st.integers(2, 40)
seeds = st.sampled_from([None, 0, 7])


def targets(rows, epoch=0):
    """The predicted tokens, row after row."""
    return [int(t) for i in range(len(rows)) for t in rows.row(i, epoch)["shift_labels"] if t != IGNORED]


def read(rows, epoch=0):
    """The input tokens, row after row, without the document starts."""
    return [int(t) for i in range(len(rows)) for t in rows.row(i, epoch)["input_ids"] if t != 0]


@few
@given(sizes, lengths, seeds, st.integers(0, 2), st.sampled_from([0, 1, 2, 3]))
def test_every_token_is_read_once_per_epoch_and_predicted_once_but_for_starts(
    numbered, sizes, length, seed, epoch, lanes
):
    corpus = numbered(sizes)
    if lanes * length > corpus.num_tokens:
        lanes = 0
    rows = PackedDataset(corpus, length, seed, carry_state=lanes > 0, lanes=lanes)
    assert sorted(targets(rows, epoch)) == corpus.text_tokens()
    assert sorted(read(rows, epoch)) == corpus.text_tokens()


@few
@given(sizes, lengths)
def test_without_a_seed_everything_keeps_its_order(numbered, sizes, length):
    corpus = numbered(sizes)
    assert targets(PackedDataset(corpus, length, None)) == corpus.text_tokens()


@few
@given(sizes, lengths, seeds)
def test_a_token_predicts_the_next_one_of_its_own_document(numbered, sizes, length, seed):
    corpus = numbered(sizes)
    last = {1000 * document + size for document, size in enumerate(sizes)}
    rows = PackedDataset(corpus, length, seed)
    for i in range(len(rows)):
        for token, target in zip(rows[i]["input_ids"].tolist(), rows[i]["shift_labels"].tolist()):
            if token == 0:
                assert target == IGNORED or target % 1000 == 1
            else:
                assert target == (IGNORED if token in last else token + 1)


@few
@given(sizes, lengths, seeds)
def test_states_are_fresh_where_rows_and_documents_start(numbered, sizes, length, seed):
    rows = PackedDataset(numbered(sizes), length, seed)
    for i in range(len(rows)):
        row = rows[i]
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        assert starts[0] == 0
        for begin, end in pairwise([*starts, length]):
            assert row["position_ids"][begin:end].tolist() == list(range(end - begin))
            assert begin == 0 or row["input_ids"][begin] == 0
            piece = row["input_ids"][begin:end]
            if row["shift_labels"][begin] != IGNORED:  # not what fills up the last row
                assert (piece[1:] != 0).all()


@few
@given(sizes, lengths, seeds)
def test_labels_are_the_same_targets_inside_a_row(numbered, sizes, length, seed):
    rows = PackedDataset(numbered(sizes), length, seed)
    for i in range(len(rows)):
        row = rows[i]
        assert torch.equal(row["labels"][1:], row["shift_labels"][:-1])
        assert row["labels"][0] == IGNORED


@few
@given(sizes, lengths, st.integers(0, 3), st.integers(0, 3))
def test_a_row_depends_on_seed_epoch_and_index_alone(numbered, sizes, length, seed, epoch):
    first, second = (PackedDataset(numbered(sizes), length, seed) for _ in range(2))
    expected = [first.row(i, epoch) for i in range(len(first))]
    for i in reversed(range(len(second))):
        second.row(i, epoch + 1)  # what was asked before must not matter
        row = second.row(i, epoch)
        for key, value in expected[i].items():
            assert value.dtype == torch.int64
            assert value.shape == (length,)
            assert torch.equal(value, row[key])


def test_seeds_and_epochs_order_documents_and_rows_differently(numbered):
    corpus = numbered([5] * 40)
    orders = [read(PackedDataset(corpus, 6, seed), epoch) for seed, epoch in [(0, 0), (1, 0), (0, 1)]]
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != corpus.text_tokens() for order in orders)


@few
@given(st.lists(st.integers(1, 60), min_size=4, max_size=12), st.integers(2, 12), seeds, st.integers(1, 4))
def test_a_row_of_a_lane_continues_the_row_before(numbered, sizes, length, seed, lanes):
    rows = PackedDataset(numbered(sizes), length, seed, carry_state=True, lanes=min(lanes, sum(sizes) // length or 1))
    assert len(rows) % rows.lanes == 0
    for lane in range(rows.lanes):
        expected = None  # the target at the end of the row before, and the position after it
        for index in range(lane, len(rows), rows.lanes):
            row = rows[index]
            if index // rows.lanes == len(rows) // rows.lanes - 1 and (row["shift_labels"] == IGNORED).all():
                continue  # a lane that ended before the others, or holds a last token alone
            elif expected is not None and expected[0] != IGNORED:
                assert row["input_ids"][0] == expected[0]
                assert row["position_ids"][0] == expected[1]
            elif expected is None or row["input_ids"][0] == 0:
                assert row["position_ids"][0] == 0
            expected = int(row["shift_labels"][-1]), int(row["position_ids"][-1]) + 1


def test_lanes_keep_long_documents_together_and_differ_by_at_most_one_row(numbered):
    rows = PackedDataset(numbered([700]), 10, carry_state=True, lanes=4)
    assert len(rows) == 4 * 18
    positions = [[int(rows[i]["position_ids"][0]) for i in range(lane, len(rows), 4)] for lane in range(4)]
    assert all(lane[:17] == list(range(0, 170, 10)) for lane in positions)


def test_with_two_processes_each_keeps_its_own_lanes(numbered):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    rows = PackedDataset(numbered([300, 500]), 10, carry_state=True, lanes=4)
    for process in range(2):
        batches = list(BatchSamplerShard(BatchSampler(SequentialSampler(rows), 2, False), 2, process))
        assert len(batches) == len(rows) // 4
        assert {index % 4 for batch in batches for index in batch} == {2 * process, 2 * process + 1}
        assert [[index // 4 for index in batch] for batch in batches] == [[step, step] for step in range(len(batches))]


def test_rows_hold_several_documents_and_begin_them_with_the_document_start(numbered):
    rows = PackedDataset(numbered([3, 3]), 10, seed=None)
    assert len(rows) == 1
    assert rows[0]["input_ids"].tolist() == [0, 1, 2, 3, 0, 1001, 1002, 1003, 0, 0]
    assert rows[0]["shift_labels"].tolist() == [1, 2, 3, -100, 1001, 1002, 1003, -100, -100, -100]
    assert rows[0]["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_a_row_names_its_documents(numbered):
    rows = PackedDataset(numbered([3, 30]), 10, seed=None)
    assert rows.describe(0) == ["document 0, tokens 0 to 4 of 4", "document 1, tokens 0 to 6 of 31"]
    assert rows.describe(1) == ["document 1, tokens 6 to 16 of 31"]


def test_persistent_workers_follow_the_epoch(numbered):
    rows = PackedDataset(numbered([50, 7, 90, 20, 44]), 16)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        rows.set_epoch(epoch)
        batches = torch.cat([batch["input_ids"] for batch in loader])
        assert torch.equal(batches, torch.stack([rows.row(i, epoch)["input_ids"] for i in range(len(rows))]))


def test_files_are_their_bytes_after_a_document_start(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    (tmp_path / "b.txt").write_bytes(b"c")
    rows = PackedDataset(ByteCorpus(find_documents(tmp_path)), 6, seed=None)
    assert rows[0]["input_ids"].tolist() == [256, 97, 98, 255, 256, 99]
    assert rows[0]["shift_labels"].tolist() == [97, 98, 255, IGNORED, 99, IGNORED]
    assert (rows.num_bytes, rows.bytes_per_target) == (4, 1.0)


def test_wrong_arguments_are_refused_with_what_was_given(numbered):
    with pytest.raises(ValueError, match="length is 1; accepted: at least 2 tokens per row"):
        PackedDataset(numbered([3]), 1)
    with pytest.raises(ValueError, match="no documents"):
        PackedDataset(numbered([]), 8)
    with pytest.raises(IndexError, match="row 1 of 1"):
        PackedDataset(numbered([3]), 8)[1]
    with pytest.raises(ValueError, match="numbered has 2 rows of 8 tokens, too few for 3 lanes"):
        PackedDataset(numbered([12]), 8, carry_state=True, lanes=3)


@few
@given(sizes, lengths, st.integers(1, 80))
def test_a_sample_of_rows_is_spread_evenly_and_counts_its_own_bytes(numbered, sizes, length, most):
    corpus = numbered(sizes)
    whole, sample = PackedDataset(corpus, length, None), PackedDataset(corpus, length, None)
    sample.sample(most)
    count = min(most, len(whole))
    assert len(sample) == count
    chosen = [i * len(whole) // count for i in range(count)]
    assert [sample[i]["input_ids"].tolist() for i in range(count)] == [whole[i]["input_ids"].tolist() for i in chosen]
    share = round(len(targets(sample)) * corpus.num_bytes / corpus.num_targets)
    assert sample.num_bytes == (corpus.num_bytes if most >= len(whole) else max(1, share))
    assert sample.bytes_per_target == whole.bytes_per_target


def test_a_sample_of_rows_in_a_random_order_or_of_none_is_refused(numbered):
    refused = [(PackedDataset(numbered([30]), 4, 0), 1), (PackedDataset(numbered([30]), 4, None), 0)]
    refused.append((PackedDataset(numbered([30]), 4, None, carry_state=True), 1))
    for rows, most in refused:
        with pytest.raises(ValueError, match=f"most_rows is {most}; accepted: 1 or more, with seed None and without"):
            rows.sample(most)


def test_a_sample_of_rows_of_whole_documents_is_of_them(numbered):
    corpus = numbered([30, 20, 10, 25, 5, 31])
    whole, sample = WholeRows(corpus, 32, None), WholeRows(corpus, 32, None)
    sample.sample(2)
    assert len(whole) == 4
    assert [read(sample)] == [[*read_row(whole, 0), *read_row(whole, 2)]]


def read_row(rows, index):
    return [int(t) for t in rows[index]["input_ids"] if t != 0]
