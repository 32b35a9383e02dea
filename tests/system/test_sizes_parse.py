"""Sizes in words, read as bytes."""

from __future__ import annotations

import pytest

from retnet.system.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * 2**30), ("1.5 MiB", 3 * 2**19), ("500MB", 500_000_000), ("2k", 2000), ("1024", 1024), ("0", 0),
     ("7B", 7), ("1tib", 2**40)],
)  # fmt: skip
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 GiBs", "1e9", "iB", "1iB", "nan", "8GiB4"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="accepted: bytes, or a number with a unit"):
        parse_bytes(text)


def test_what_is_written_is_read_again():
    for count in (1, 2**10, 3 * 2**20, 2**40):
        assert parse_bytes(format_bytes(count)) == count
