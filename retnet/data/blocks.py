"""Blocks: documents cut out of a text at separators, and into pieces of bounded size between characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Separator:
    r"""The text between documents. A line break in it, `\n`, matches `\r\n` too, which ends lines of Windows.

    pattern: what it matches in bytes. longest: bytes of the longest match.
    """

    text: str

    @property
    def pattern(self) -> re.Pattern[bytes]:
        return re.compile(re.sub(rb"(?<!\\\r)\\\n", rb"(?:\r?\n)", re.escape(self.text.encode())))

    @property
    def longest(self) -> int:
        return len(self.text.encode()) + self.text.count("\n")


def cut_documents(chunks: Iterable[bytes], separator: Separator | None) -> Iterator[tuple[bytes, bool]]:
    """Documents between separators as (block, whether it is the document's last), empty ones too.

    Without a separator everything is one document. No more than a chunk and two blocks are in memory.
    """
    pattern, held = (None, 0) if separator is None else (separator.pattern, separator.longest)
    rest = b""
    for chunk in chunks:
        rest += chunk
        if pattern is not None:
            *whole, rest = pattern.split(rest)
            for document in whole:
                yield from cut_blocks(document)
        while len(rest) > BLOCK_BYTES + held:  # a separator may have begun in the last bytes
            cut = _between_characters(rest)
            yield rest[:cut], False
            rest = rest[cut:]
    yield from cut_blocks(rest)


def cut_blocks(document: bytes) -> Iterator[tuple[bytes, bool]]:
    """A document in blocks as (block, whether it is the last)."""
    while len(document) > BLOCK_BYTES:
        cut = _between_characters(document)
        yield document[:cut], False
        document = document[cut:]
    yield document, True


def _between_characters(data: bytes) -> int:
    """The end of the first block of data longer than `BLOCK_BYTES`."""
    cut = BLOCK_BYTES
    while cut > BLOCK_BYTES - 3 and data[cut] & 0xC0 == 0x80:  # inside a character of UTF-8
        cut -= 1
    return cut
