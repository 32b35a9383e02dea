import numpy as np
import pytest
import torch

from retnet.data import Mixture, PackedDataset


def origin(row):
    """The corpus that a row comes from, which `three` encodes in the tokens."""
    return int(row["input_ids"].max()) // 100_000


@pytest.fixture
def three(numbered):
    class Shifted(numbered):
        def whole(self, document):
            tokens = super().whole(document)
            return np.where(tokens > 0, tokens + 100_000 * int(self.name), 0)

    return [Shifted([30, 50, 70], "0"), Shifted([90] * 20, "1"), Shifted([20] * 60, "2")]


def test_tokens_have_the_given_shares_at_every_point_of_a_run(three):
    mixture = Mixture(three, [0.5, 0.3, 0.2], 16)
    total = 4 * len(mixture)
    origins = [origin(mixture.row(t % len(mixture), t // len(mixture))) for t in range(total)]
    for part, share in enumerate([0.5, 0.3, 0.2]):
        so_far = np.cumsum(np.array(origins) == part)
        assert np.abs(so_far - share * np.arange(1, total + 1)).max() < 0.6  # of a row


def test_each_part_is_read_in_its_own_order_without_a_gap(three):
    mixture = Mixture(three, [2, 1, 1], 16, seed=3)
    rows = [mixture.row(t % len(mixture), t // len(mixture)) for t in range(3 * len(mixture))]
    for number, part in enumerate(mixture.parts):
        mine = [row["input_ids"] for row in rows if origin(row) == number]
        expected = [part.row(i % len(part), i // len(part))["input_ids"] for i in range(len(mine))]
        assert all(map(torch.equal, mine, expected))
        assert len(mine) > len(part)  # it has begun again


def test_rows_depend_on_the_arguments_and_the_seed_alone(three):
    same = [Mixture(three, [1, 2, 3], 16, seed=5) for _ in range(2)]
    other = Mixture(three, [1, 2, 3], 16, seed=6)
    rows = [[m[i]["input_ids"].tolist() for i in range(len(m))] for m in (*same, other)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_a_corpus_given_twice_is_read_in_two_orders(numbered):
    corpus = numbered([9] * 50)
    mixture = Mixture([corpus, corpus], [1, 1], 10)
    first, second = ([part[i]["input_ids"].tolist() for i in range(len(part))] for part in mixture.parts)
    assert sorted(first) == sorted(second)
    assert first != second


def test_bytes_per_target_is_the_mean_over_the_mixed_stream(numbered):
    dense, sparse = numbered([10] * 10), numbered([10] * 10)
    sparse.num_bytes *= 3
    mixture = Mixture([dense, sparse], [0.75, 0.25], 11)
    parts = mixture.parts
    assert mixture.bytes_per_target == 0.75 * parts[0].bytes_per_target + 0.25 * parts[1].bytes_per_target


def test_with_carried_state_each_lane_continues_its_own_corpus(three):
    mixture = Mixture(three[1:], [0.75, 0.25], 16, carry_state=True, lanes=4)
    before = {}
    for t in range(2 * len(mixture)):
        row = mixture.row(t % len(mixture), t // len(mixture))
        lane = t % 4
        if (row["input_ids"] > 0).any():
            assert origin(row) == (1 if lane < 3 else 2)
        if row["position_ids"][0] > 0 and (row["shift_labels"] != -100).any():
            assert row["input_ids"][0] == before[lane]
        before[lane] = int(row["shift_labels"][-1])


def test_a_mixture_of_one_corpus_gives_that_corpus(three):
    mixture = Mixture(three[:1], [3.0], 16)
    assert len(mixture) == len(PackedDataset(three[0], 16))
    assert mixture.shares == [1.0]


def test_rows_name_their_documents(three):
    assert "tokens" in Mixture(three, [1, 1, 1], 16).describe(4)[0]


def test_wrong_arguments_are_refused_with_what_was_given(three, numbered):
    with pytest.raises(ValueError, match="3 corpora with 2 weights"):
        Mixture(three, [1, 1], 16)
    with pytest.raises(ValueError, match=r"weight of 1 is -1; accepted: numbers above 0"):
        Mixture(three, [1, -1, 1], 16)
    with pytest.raises(ValueError, match="less than 1 row in 10000"):
        Mixture(three[:2], [1, 1e-6], 16)
    with pytest.raises(ValueError, match=r"give 2\.8, 1\.2 of 4 lanes"):
        Mixture(three[:2], [0.7, 0.3], 16, carry_state=True, lanes=4)
    with pytest.raises(ValueError, match=r"different tokenizers .*numbered: bytes of 257, start 0"):
        Mixture([three[0], numbered([9], vocab_size=257)], [1, 1], 16)
    with pytest.raises(IndexError, match="row -1"):
        Mixture(three, [1, 1, 1], 16)[-1]
