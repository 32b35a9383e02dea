import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.data import blocks
from retnet.data.blocks import Separator, cut_documents


@pytest.fixture(scope="module")  # not for the session: other files would get these blocks too
def small_blocks():
    """Blocks of 32 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", 32)
        yield


def documents_of(chunks, separator):
    """The documents of some chunks, and the size of the largest block."""
    found = list(cut_documents(chunks, separator))
    joined = "".join(block.decode() + ("\1" if last else "") for block, last in found)
    return joined.split("\1")[:-1], max(len(block) for block, _ in found)


text_of_few_letters = st.text("ab é状 \n\r;", max_size=200)
some_separators = st.sampled_from(["", ";", ";\n", "ab", "\n\n", "\n", "\r\n", "\n;\n", "\r", "\n\r"])


@given(text_of_few_letters, some_separators, st.lists(st.integers(1, 40), min_size=1))
def test_documents_end_at_separators_whatever_the_chunks(small_blocks, text, separator, sizes):
    data = text.encode()
    chunks, at = [], 0
    while at < len(data):
        chunks.append(data[at : at + sizes[len(chunks) % len(sizes)]])
        at += len(chunks[-1])
    between = Separator(separator) if separator else None
    found, largest = documents_of(chunks, between)
    breaks = re.escape(separator).replace("\\\r\\\n", "\0").replace("\\\n", "\r?\n").replace("\0", "\r\n")
    assert found == (re.split(breaks, text) if separator else [text])
    assert found == documents_of([data], between)[0]
    assert largest <= 32


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_line_break_in_a_separator_matches_those_of_every_system(line_break):
    lines = ["one", "more", "", "two", "", "", "three"]
    text = line_break.join(lines).encode()
    found, _ = documents_of([text], Separator("\n\n"))
    assert found == [f"one{line_break}more", "two", f"{line_break}three"]
    assert documents_of([text], Separator("\n\n\n"))[0] == [line_break.join(lines[:4]), "three"]


def test_line_breaks_of_two_systems_in_one_file_both_separate():
    assert documents_of([b"a\r\n\r\nb\n\nc\r\n\nd"], Separator("\n\n"))[0] == ["a", "b", "c", "d"]


def test_a_carriage_return_that_is_asked_for_must_be_there():
    assert documents_of([b"a\r\nb\nc"], Separator("\r\n"))[0] == ["a", "b\nc"]
