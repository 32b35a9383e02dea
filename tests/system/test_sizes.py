"""Byte counts in words."""

import pytest

from retnet.system.sizes import format_bytes, format_count, quantity, spans


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (4 << 20, "4 MiB"),
     (1023 << 30, "1023 GiB"), (1 << 40, "1 TiB"), (5 << 50, "5120 TiB"), (-2048, "-2 KiB")],
)  # fmt: skip
def test_bytes_are_written_in_the_largest_unit_below_them(count, words):
    assert format_bytes(count) == words


def test_rounding_keeps_the_unit():
    assert format_bytes(1234567, digits=2) == "1.2 MiB"
    assert format_bytes(1023 << 10, digits=2) == "1023 KiB"


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0"), (3412, "3,412"), (999_999, "999,999"), (19_950_300, "19.95M"), (2**31, "2,147.48M")],
)
def test_counts_have_separators(count, words):
    assert format_count(count) == words


def test_counted_things_have_their_plural():
    assert [quantity(n, "token") for n in (0, 1, 1000)] == ["0 tokens", "1 token", "1,000 tokens"]
    assert quantity(2, "process", "processes") == "2 processes"


@pytest.mark.parametrize(
    ("numbers", "words"), [([], ""), ([3], "3"), ([3, 6], "3, 6"), ([0, 1, 2, 5, 7, 8], "0 to 2, 5, 7 to 8")]
)
def test_numbers_that_follow_each_other_are_a_span(numbers, words):
    assert spans(numbers) == words
