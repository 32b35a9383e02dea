import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.data.shuffle import make_key, permute


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_the_permutation_is_one_to_one(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(st.integers(1, 10**12), st.integers(0, 2**64 - 1), st.data())
def test_one_index_alone_gives_the_same_place_as_in_an_array(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    landed = permute(np.array(indices), size, key)
    assert [int(permute(index, size, key)) for index in indices] == landed.tolist()
    assert landed.min() >= 0
    assert landed.max() < size


def test_the_order_never_changes_between_versions():
    assert permute(np.arange(10), 10, make_key("rows", 0, 0)).tolist() == [8, 6, 3, 2, 1, 9, 7, 0, 5, 4]


def test_neighbours_are_scattered():
    landed = permute(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(np.arange(10_000), landed)[0, 1]) < 0.05
    steps = np.abs(np.diff(landed))
    assert 3000 < steps.mean() < 3700  # 10000 / 3 for an order drawn at random


def test_an_index_out_of_range_is_refused():
    with pytest.raises(IndexError, match="from 3 to 3, of 3"):
        permute(3, 3, 0)
