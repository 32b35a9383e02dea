"""Prompt lookup: the place where the last few tokens of a context occurred before, found in memory of fixed size."""

from collections.abc import Iterator, Sequence

MOST_ENTRIES = 2**15  # of a table
ENTRIES_PER_TOKEN = 4  # of a shorter context, so that few n-grams share an entry
BYTES_PER_ENTRY = 4
BITS, MASK = 32, 2**32 - 1  # of a hash


def table_entries(max_tokens: int | None) -> int:
    """Entries of the table for each n, a power of two, for contexts of up to max_tokens (None: of any length)."""
    if max_tokens is None or ENTRIES_PER_TOKEN * max_tokens >= MOST_ENTRIES:
        return MOST_ENTRIES
    return 1 << (ENTRIES_PER_TOKEN * max_tokens - 1).bit_length()


class PromptLookup:
    """The last place of each n-gram in one context, for n from 1 to `longest`.

    For each n a table of `entries` holds positions, found by a hash of the n-gram. An n-gram overwrites an older one of
    the same hash, so of a context of far more tokens than entries the later part is known. The cost per step depends on
    the new tokens alone.
    """

    def __init__(self, longest: int, entries: int = MOST_ENTRIES):
        self.longest, self.entries = longest, entries
        self._memory = bytearray(self.bytes_of(longest, entries))
        self._ends = memoryview(self._memory).cast("i")  # the position after each n-gram; 0: none
        self._shift = BITS - (entries.bit_length() - 1)
        self.num_indexed = 0

    @staticmethod
    def bytes_of(longest: int, entries: int) -> int:
        return BYTES_PER_ENTRY * longest * entries

    @property
    def nbytes(self) -> int:
        return len(self._memory)

    def clear(self) -> None:
        """Forget the context."""
        if self.num_indexed:
            self._memory[:] = bytes(len(self._memory))
        self.num_indexed = 0

    def index(self, seen: Sequence[int], length: int) -> None:
        """Index the first `length` tokens; done chunk by chunk, so that no step waits for a whole prompt."""
        for end in range(self.num_indexed + 1, length):
            for entry in self._entries(seen, end):
                self._ends[entry] = end
        self.num_indexed = max(self.num_indexed, length - 1)

    def draft(self, seen: Sequence[int], count: int) -> list[int]:
        """The `count` tokens after the longest n-gram at the end of `seen` that occurred before; empty if none did.

        Where they reach the end of `seen`, the draft repeats from their start.
        """
        self.index(seen, len(seen))
        entries = list(self._entries(seen, len(seen)))
        for n in range(len(entries), 0, -1):
            end = self._ends[entries[n - 1]]
            if end and seen[end - n : end] == seen[-n:]:
                return [seen[end + i % (len(seen) - end)] for i in range(count)]
        return []

    def _entries(self, seen: Sequence[int], end: int) -> Iterator[int]:
        """The entries of the n-grams that end before `end`, for n from 1."""
        mixed = 0
        for n in range(1, min(self.longest, end) + 1):
            mixed = (mixed * 0x9E3779B1 + seen[end - n] + 1) & MASK
            yield (n - 1) * self.entries + ((mixed * 0x85EBCA6B & MASK) >> self._shift)
