"""The prefix cache: states after prefixes of prompts, so that a prompt with a cached prefix reads only its own part.

A state serves only the exact tokens that it has read, and takes as much memory as thousands of tokens. Tokens are
cheap, so a radix tree remembers all prompts, and it tells where they part. States are kept there, and at the ends of
prompts and of conversations. The longest match is used.

Prompts belong to groups (of one API key, for example). A prompt finds states of its own group only, and learns nothing
of other groups but what the common budget leaves it. The budget and the order of eviction are common to all groups.

Order of eviction, when the memory budget is full:

1. Branch points (where prompts part, or that hit twice) that no prompt used for a while.
2. Ends: first those inside of a longer cached prefix (the last turn of a conversation replaces the turn before it),
   then the least recently used.
3. Other branch points that none of the last few prompts used: for a new branch point, or if they take most of the room.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from weakref import WeakSet

from retnet.models.states import ModelState
from retnet.serve.radix import Node, RadixTree

# Cuts inside a prompt, in tokens. The chunkwise form sums in chunks of 64, where a cut changes no bits on a CPU.
COARSE, FINE, LEAST = 64, 16, 32
TREE_BYTES, TREE_SHARE = 2**25, 64  # for tokens of earlier prompts, 4 bytes each: or 1/64 of the budget
# Lookups for each cached state: a branch point that none of them used is out of use, or may be replaced by another.
OUT_OF_USE, RECENT = 8, 2
MOST_BRANCHES = 3 / 4  # of the states; ends may replace those beyond it


@dataclass
class PrefixCounts:
    """Counts of the cache.

    misses: by reason. declined: states without room, because those in use take it all. prompt_tokens: looked up;
    tokens_saved of them were not read again. states, state_bytes: in the cache now. groups, token_bytes: those with
    remembered tokens, and the memory of these tokens.
    """

    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    stored: int = 0
    evicted: int = 0
    declined: int = 0
    too_large: int = 0
    prompt_tokens: int = 0
    tokens_saved: int = 0
    states: int = 0
    state_bytes: int = 0
    groups: int = 0
    token_bytes: int = 0

    @property
    def bytes_per_prompt_token(self) -> float:
        """Bytes of states in the cache per prompt token that was looked up."""
        return self.state_bytes / max(1, self.prompt_tokens)


@dataclass
class Cached:
    """The state after one prefix. used: the lookup that used it last; hits: prompts that continued from it."""

    state: ModelState
    nbytes: int
    used: int
    hits: int = 0


class PrefixCache:
    """States of single sequences by the tokens that they have read, in at most `budget_bytes` of memory.

    chunk: tokens of a prompt chunk. Where prompts part, the length is rounded down to a multiple of 64 tokens, or of 16
    where that would lose a fifth. The first state of a prompt has read at least 32 tokens, and the next are at least 64
    apart. None of these numbers is above the chunk.
    """

    def __init__(self, budget_bytes: int, chunk: int = COARSE):
        if budget_bytes < 1:
            raise ValueError(f"the prefix cache has a budget of {budget_bytes} bytes; accepted: a positive number")
        self.budget_bytes, self.tree_bytes = budget_bytes, max(TREE_BYTES, budget_bytes // TREE_SHARE)
        self.coarse, self.fine, self.least = (min(size, chunk) for size in (COARSE, FINE, LEAST))
        self.counts = PrefixCounts()
        self.tree = RadixTree[Cached]()
        self._ends: OrderedDict[Node[Cached], Cached] = OrderedDict()  # in order of eviction
        self._branches: OrderedDict[Node[Cached], Cached] = OrderedDict()
        self._dropped: WeakSet[Node[Cached]] = WeakSet()  # to report why a prompt missed
        self._groups: set[str] = set()  # that had a state; as long as their tokens are remembered
        self._num_lookups = 0
        self.version = 0  # counts changes
        self._broken_off = False  # the last change, by an exception

    def __len__(self) -> int:
        return len(self._ends) + len(self._branches)

    @property
    def nbytes(self) -> int:
        return self.counts.state_bytes

    def note(self, tokens: array, group: str = "") -> None:
        """Remember a prompt or a conversation, so that a later one shows where the two part."""
        if self._too_long(tokens):
            return
        with self._change():
            self.tree.insert(tokens, group)
            for node in (None, *self._ends, *self._branches):
                if self.tree.nbytes <= self.tree_bytes:
                    break
                if node is not None:  # prefixes so long that their tokens take the room
                    self._drop(node)
                    self.counts.evicted += 1
                self.tree.prune(self.tree_bytes // 4 * 3)
                self._groups &= self.tree.roots.keys()

    def cuts(self, tokens: array, group: str = "") -> list[int]:
        """Where `tokens` part from other prompts and no state is near: after how many of them to keep one."""
        cuts, last = [], 0
        for node in self.tree.path(tokens, group):
            cut = self._cut(node.end)
            if node.value is not None:
                last = node.end
            elif len(node.children) > 1 and cut - last >= (self.coarse if last else self.least):
                cuts.append(cut)
                last = cut
        return cuts

    def longest(self, tokens: array, group: str = "") -> int:
        """The length of the longest cached prefix of `tokens`; 0 without any. Not counted as a lookup."""
        return max((node.end for node in self.tree.path(tokens, group) if node.value is not None), default=0)

    def find(
        self, tokens: array, read: int = 0, handed: tuple[int, ModelState] | None = None, *, group: str = ""
    ) -> tuple[int, ModelState] | None:
        """The longest cached prefix of `tokens` that is longer than `read`: its length and state, or None.

        handed: a prefix that was just read for another prompt; it is used if the cache has no longer one. Counts a hit
        or a miss, unless no prefix can be longer than `read`.
        """
        if len(tokens) <= read:
            return None
        with self._change():
            self._num_lookups += 1
            self.counts.prompt_tokens += len(tokens) - read
            path = [node for node in self.tree.path(tokens, group) if node.end > read]
            found = next((node for node in reversed(path) if node.value is not None), None)
            if handed is not None and handed[0] > max(read, 0 if found is None else found.end):
                length, state = handed
            elif found is not None and found.value is not None:
                length, state = found.end, found.value.state
                found.value.hits += 1
                self._use(found)
            else:
                self.counts.misses[self._why_missed(tokens, read, group)] += 1
                return None
            self.counts.hits += 1
            self.counts.tokens_saved += length - read
            return length, state

    def why_not_longer(self, tokens: array, read: int = 0, group: str = "") -> str | None:
        """Why no cached prefix of `tokens` is longer than `read`; None if `read` is all of them."""
        return None if len(tokens) <= read else self._why_missed(tokens, read, group)

    def wants(self, tokens: array, nbytes: int, *, branch: bool = False, group: str = "") -> bool:
        """Whether to store the state after `tokens`: it is not there, and there is room. One that is there counts as
        used."""
        with self._change():
            path = self.tree.path(tokens, group)
            node = path[-1] if path and path[-1].end == len(tokens) else None
            if node is not None and node.value is not None:
                self._use(node, branch)
                return False
            if nbytes > self.budget_bytes or self._too_long(tokens):
                self.counts.too_large += 1
                return False
            room = self._room(nbytes, branch) is not None
            self.counts.declined += not room
            return room

    def store(self, tokens: array, state: ModelState, *, branch: bool = False, group: str = "") -> None:
        """Cache the state after `tokens`; the caller must not change it afterwards. branch: other prompts begin with
        these tokens too, so that ends are evicted first."""
        if not self.wants(tokens, state.nbytes, branch=branch, group=group):
            return
        with self._change():
            for node in self._room(state.nbytes, branch) or ():
                self._drop(node)
                self.counts.evicted += 1
            for node in self.tree.path(tokens, group):
                if node in self._ends and node.value is not None and node.value.hits < 2:
                    self._ends.move_to_end(node, last=False)
            node = self.tree.insert(tokens, group)
            node.value = Cached(state, state.nbytes, self._num_lookups)
            (self._branches if branch else self._ends)[node] = node.value
            self._dropped.discard(node)
            self._groups.add(group)
            self.counts.stored += 1
            self.counts.states += 1
            self.counts.state_bytes += node.value.nbytes

    def clear(self) -> None:
        """Drop all states; the counts stay."""
        with self._change():
            for node in [*self._ends, *self._branches]:
                self._drop(node)
            self._dropped.clear()
            self._groups.clear()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change of the cache. One that an exception breaks off loses everything that is cached, and no more."""
        if self._broken_off:
            self.tree = RadixTree()
            self._ends.clear()
            self._branches.clear()
            self._groups.clear()
            self.counts.states = self.counts.state_bytes = 0
        self._broken_off = True
        self.version += 1
        yield
        self.counts.groups, self.counts.token_bytes = len(self.tree.roots), self.tree.nbytes
        self._broken_off = False

    def _too_long(self, tokens: array) -> bool:
        """Whether the tokens would take the room of all others."""
        return tokens.itemsize * len(tokens) > self.tree_bytes // 4

    def _cut(self, end: int) -> int:
        """Where to keep a state for prompts that part after `end` tokens."""
        coarse = end // self.coarse * self.coarse
        return coarse if coarse >= 0.8 * end else end // self.fine * self.fine

    def _use(self, node: Node[Cached], branch: bool = False) -> None:
        assert node.value is not None
        node.value.used = self._num_lookups
        if node in self._ends and (branch or node.value.hits > 1):
            self._branches[node] = self._ends.pop(node)
        (self._branches if node in self._branches else self._ends).move_to_end(node)

    def _room(self, nbytes: int, branch: bool) -> list[Node[Cached]] | None:
        """The states to drop so that one of `nbytes` fits; None if those that may be dropped are not enough."""
        excess, dropped = self.nbytes + nbytes - self.budget_bytes, []
        order = self._eviction_order(branch)
        while excess > 0:
            node = next(order, None)
            if node is None or node.value is None:
                return None
            dropped.append(node)
            excess -= node.value.nbytes
        return dropped

    def _eviction_order(self, branch: bool) -> Iterator[Node[Cached]]:
        """The states that may be dropped for one more, a branch point or an end."""
        limit, recent = OUT_OF_USE * len(self), RECENT * len(self)
        yield from takewhile(lambda node: self._unused(node) > limit, self._branches)
        yield from self._ends
        if not branch:
            recent = max(recent, OUT_OF_USE)
        if branch or len(self._branches) > MOST_BRANCHES * len(self):
            yield from (node for node in self._branches if recent <= self._unused(node) <= limit)

    def _unused(self, node: Node[Cached]) -> int:
        """Lookups since a branch point was used."""
        return self._num_lookups - self._branches[node].used

    def _drop(self, node: Node[Cached]) -> None:
        assert node.value is not None
        self.counts.states -= 1
        self.counts.state_bytes -= node.value.nbytes
        (self._branches if node in self._branches else self._ends).pop(node)
        node.value = None
        self._dropped.add(node)

    def _why_missed(self, tokens: array, read: int, group: str) -> str:
        if group not in self._groups:
            return "the cache is empty"
        if any(node in self._dropped for node in self.tree.path(tokens, group) if node.end > read):
            return "the state was dropped to stay within the budget"
        shared = self.tree.shared(tokens, group)
        if shared <= read:
            return "no cached prompt has more of these tokens" if read else "no cached prompt begins with these tokens"
        if self._cut(shared) - read >= self.least:
            return "a prompt began alike, but no state was kept where they part"
        return f"fewer than {self.least} {'more ' if read else ''}tokens in common with another prompt"
