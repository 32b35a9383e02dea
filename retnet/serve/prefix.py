"""The prefix cache: states after prefixes of prompts, so that a prompt with a cached prefix reads only its own part.

A state is exact for one prefix and useless for any other, so an entry is found by the hash of all its tokens. Prefixes
end at chunk boundaries, at the ends of prompts and of their shared parts, and at the ends of conversations. The longest
match is used. When the memory budget is full, the least recently used entries are dropped first.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from retnet.models.states import ModelState

REMEMBERED = 4096  # keys of dropped states, to report why a prompt missed


@dataclass
class PrefixCounts:
    """Counts of the cache. misses: by reason; tokens_saved: prompt tokens that were not read again."""

    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    stored: int = 0
    evicted: int = 0
    too_large: int = 0
    tokens_saved: int = 0


class PrefixCache:
    """States of single sequences by the tokens that they have read, in at most `budget_bytes` of memory."""

    def __init__(self, budget_bytes: int):
        if budget_bytes < 1:
            raise ValueError(f"the prefix cache has a budget of {budget_bytes} bytes; accepted: a positive number")
        self.budget_bytes, self.nbytes = budget_bytes, 0
        self.counts = PrefixCounts()
        self._states: OrderedDict[tuple[int, bytes], ModelState] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._dropped: OrderedDict[tuple[int, bytes], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def find(self, tokens: array, read: int = 0) -> tuple[int, ModelState] | None:
        """The longest cached prefix of `tokens` that is longer than `read`: its length and state, or None.

        Counts a hit or a miss, unless no prefix can be longer.
        """
        if len(tokens) <= read:
            return None
        lengths = {*self._lengths, *(length for length, _ in self._dropped)}
        keys = _keys(tokens, [length for length in lengths if read < length <= len(tokens)])
        for key in reversed(keys):
            if key in self._states:
                self._states.move_to_end(key)
                self.counts.hits += 1
                self.counts.tokens_saved += key[0] - read
                return key[0], self._states[key]
        if not self._states and not self._dropped:
            reason = "the cache is empty"
        elif any(key in self._dropped for key in keys):
            reason = "the state was dropped to stay within the budget"
        else:
            reason = "no cached prompt begins with these tokens"
        self.counts.misses[reason] += 1
        return None

    def has(self, tokens: array) -> bool:
        """Whether the state after exactly these tokens is cached; if so, it counts as used."""
        key = _keys(tokens, [len(tokens)])[0]
        if key in self._states:
            self._states.move_to_end(key)
        return key in self._states

    def store(self, tokens: array, state: ModelState) -> None:
        """Cache the state after `tokens`; the caller must not change it afterwards."""
        key, size = _keys(tokens, [len(tokens)])[0], state.nbytes
        if size > self.budget_bytes:
            self.counts.too_large += 1
            return
        if key in self._states:
            self._drop(key)
        while self.nbytes + size > self.budget_bytes:
            oldest = next(iter(self._states))
            self._drop(oldest)
            self.counts.evicted += 1
            self._dropped[oldest] = None
            if len(self._dropped) > REMEMBERED:
                self._dropped.popitem(last=False)
        self._dropped.pop(key, None)
        self._states[key] = state
        self._lengths[key[0]] += 1
        self.nbytes += size
        self.counts.stored += 1

    def clear(self) -> None:
        """Forget all states; the counts stay."""
        self._states.clear()
        self._lengths.clear()
        self._dropped.clear()
        self.nbytes = 0

    def _drop(self, key: tuple[int, bytes]) -> None:
        self.nbytes -= self._states.pop(key).nbytes
        self._lengths[key[0]] -= 1
        if not self._lengths[key[0]]:
            del self._lengths[key[0]]


def _keys(tokens: array, lengths: list[int]) -> list[tuple[int, bytes]]:
    """(length, SHA-256 of the first `length` tokens) in rising order, in one pass over the tokens."""
    digest, done, keys = hashlib.sha256(), 0, []
    data = memoryview(tokens)
    for length in sorted(lengths):
        digest.update(data[done:length])
        done = length
        keys.append((length, digest.copy().digest()))
    return keys
