"""Prefill: prompts are read in chunks, in turn, within a budget of tokens per step; prefixes go into the cache.

Chunks end at multiples of the chunk size, where the prefix cache keeps a state, and before a prompt's last token. A
prompt that begins like one that is being read waits until their common beginning is read, and continues from there.
Only prompts of the same group share states.
"""

from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from retnet.models.decode.step import DecodeStep
from retnet.models.states import ModelState
from retnet.serve.drafting import Drafter
from retnet.serve.pool import SlotPool
from retnet.serve.prefix import PrefixCache
from retnet.serve.radix import common_length
from retnet.serve.request import Generation, Status
from retnet.serve.stages import Stages
from retnet.serve.weights import WeightsWatch


class Prefill:
    """The prompts being read, one chunk of each in turn.

    chunk: tokens per call of the model. budget: tokens per step; at least one chunk is read. prefix_interval: the cache
    also keeps the state every so many tokens inside a prompt.
    """

    def __init__(
        self,
        step: DecodeStep,
        pool: SlotPool,
        stages: Stages,
        drafter: Drafter | None,
        prefixes: PrefixCache | None,
        weights: WeightsWatch,
        *,
        chunk: int,
        budget: int,
        prefix_interval: int | None,
    ):
        self.step, self.pool, self.stages, self.drafter = step, pool, stages, drafter
        self.prefixes, self.weights = prefixes, weights
        self.chunk, self.budget, self.prefix_interval = chunk, budget, prefix_interval
        self.num_tokens = 0  # read so far
        self._expected: deque[Generation] = deque()
        self._cuts: WeakKeyDictionary[Generation, tuple[int, list[int]]] = WeakKeyDictionary()  # of a cache's version

    def expect(self, generation: Generation) -> None:
        """Let the prompts that are read from the next step on take account of one that waits for a slot."""
        if self.prefixes is not None and generation.prefix_group is not None:
            self._expected.append(generation)

    def enter(self, generation: Generation) -> None:
        """Give a waiting generation a slot."""
        self._look_ahead()
        generation.slot = self.pool.take()
        if self.drafter is not None and generation.slot is not None:
            self.drafter.enter(generation.slot)
        self._begin(generation)
        self.stages.reading.append(generation)
        generation.status = Status.READING

    def run(self, start: Callable[[Generation], None], fail: Callable[[Generation, str], None]) -> None:
        """Read within the budget. start: called for each prompt that is read; fail: for one that cannot be read."""
        self._look_ahead()
        left, stages = self.budget, self.stages
        while stages.reading:
            generation = stages.reading[0]
            if self._waits(generation):
                stages.reading.rotate(-1)  # behind the prompt that it waits for
                continue
            place = self._places(generation)[0]
            end = min((generation.read // self.chunk + 1) * self.chunk, place)
            if end - generation.read > left < self.budget:
                return
            left -= end - generation.read
            stages.in_doubt = (generation,)
            try:
                kept = self._read(generation, end, place) if generation.unread else None
            except Exception as error:  # from this request alone: no other is in the call
                fail(generation, f"its prompt cannot be read: {str(error) or repr(error)}")
                continue
            stages.reading.popleft()
            if generation.unread:
                stages.reading.append(generation)
            else:
                start(generation)
            stages.in_doubt = ()
            if kept is not None:
                self._hand_over(generation, kept)

    def keep_prefix(self, generation: Generation, *, branch: bool = False, needed: bool = False) -> ModelState | None:
        """Put the state after the tokens read so far into the prefix cache, unless it is there, has no room, or is not
        finite or not exact. Returns the state if it was put there, or if it is `needed`."""
        group = generation.prefix_group
        if self.prefixes is None or group is None or generation.slot is None or not generation.read:
            return None
        if generation.rounding_error or self.weights.changed:
            return None
        tokens = generation.seen[: generation.read]
        self.prefixes.note(tokens, group)
        size = self.pool.state.slot(generation.slot).trim().nbytes
        if not needed and not self.prefixes.wants(tokens, size, branch=branch, group=group):
            return None
        state = self.pool.copy(generation.slot)
        if int(state.position) != generation.read:
            raise RuntimeError(f"the state has read {int(state.position)} tokens, not the request's {generation.read}")
        if not self.pool.is_finite(state):  # otherwise every prompt with this prefix would fail
            return None
        self.prefixes.store(tokens, state, branch=branch, group=group)
        return state

    def _look_ahead(self) -> None:
        while self.prefixes is not None and self._expected:
            generation = self._expected.popleft()
            self.prefixes.note(generation.seen, generation.prefix_group or "")

    def _begin(self, generation: Generation, handed: tuple[int, ModelState] | None = None) -> None:
        """Let a prompt in a slot continue from the longest prefix at hand: that of its snapshot, a cached one, or one
        `handed` over. If a prompt that is being read will soon have a longer one, it waits for that instead."""
        before = self.stages.in_doubt
        self.stages.in_doubt = (*before, generation)
        generation.awaited, found = None, None
        generation.prefix_miss = self._why_not_looked_up(generation)
        if self.prefixes is not None and generation.prefix_miss is None:
            tokens, group = generation.seen[:-1], generation.prefix_group or ""
            at_hand = max(generation.read, self.prefixes.longest(tokens, group), 0 if handed is None else handed[0])
            generation.awaited = self._longer_prefix(generation, at_hand)
            if generation.awaited is None:
                found = self.prefixes.find(tokens, generation.read, handed, group=group)
                length = generation.read if found is None else found[0]
                generation.prefix_miss = self.prefixes.why_not_longer(tokens, length, group)
        if generation.awaited is None:
            self._continue_from(generation, found)
        self.stages.in_doubt = before

    def _why_not_looked_up(self, generation: Generation) -> str | None:
        """Why a prompt is read without looking at the cache; None if it is looked up, or has nothing to read."""
        if not generation.unread:
            return None
        if self.prefixes is None:
            return "the engine has no prefix cache"
        if generation.prefix_group is None:
            return "the request has no prefix group"
        if generation.scores is not None:
            return "log-probabilities of the prompt are asked for, so every token of it is read"
        return "the weights changed" if self.weights.changed else None

    def _continue_from(self, generation: Generation, found: tuple[int, ModelState] | None) -> None:
        """Write a prefix's state, or that of the request's snapshot, into the slot."""
        assert generation.slot is not None
        state = None if generation.start is None else generation.start.state
        if found is not None:
            generation.cached, generation.rounding_error = found[0] - generation.read, 0.0
            generation.read, state = found
        self.pool.write(generation.slot, state)
        generation.start = None

    def _longer_prefix(self, generation: Generation, at_hand: int) -> tuple[Generation, int] | None:
        """The prompt whose state will be kept after the most tokens in common with this one, and their number.

        To wait for it is no slower than to read from `at_hand`: both would take turns, and it has come as far already.
        """
        tokens, longest, group = generation.seen[:-1], None, generation.prefix_group
        for other in self.stages.reading:
            if other is generation or other.prefix_group != group or other.awaited is not None:
                continue
            if other.rounding_error or other.read < at_hand:
                continue
            common = common_length(tokens, other.seen)
            places = [place for place in self._places(other) if place <= common] if common > at_hand else []
            if places and places[-1] > max(at_hand, 0 if longest is None else longest[1]):
                longest = other, places[-1]
        return longest

    def _waits(self, generation: Generation) -> bool:
        """Whether a prompt still waits for another; one whose wait was in vain begins."""
        if generation.awaited is None:
            return False
        other, length = generation.awaited
        if other.status is not Status.READING or other.read >= length:
            self._begin(generation)
        return generation.awaited is not None

    def _hand_over(self, generation: Generation, state: ModelState) -> None:
        """Let the prompts that waited for this state continue from it."""
        place = generation.read
        for other in list(self.stages.reading):
            if other.awaited is not None and other.awaited == (generation, place):
                self._begin(other, (place, state))

    def _places(self, generation: Generation) -> list[int]:
        """Where states are kept in the rest of a prompt: where it parts from others, and last before its last token."""
        end = len(generation.seen) - 1
        inside, group = {generation.shared_end}, generation.prefix_group
        if self.prefixes is not None and group is not None:
            version, cuts = self._cuts.get(generation, (-1, []))
            if version != self.prefixes.version:
                version, cuts = self.prefixes.version, self.prefixes.cuts(generation.seen[:end], group)
                self._cuts[generation] = version, cuts
            inside.update(cuts)
        return [*sorted(place for place in inside if generation.read < place < end), end]

    def _read(self, generation: Generation, end: int, place: int) -> ModelState | None:
        """Read up to `end`. Returns the state there if it is `place` and prompts wait for it or the cache keeps it."""
        assert generation.slot is not None
        ids = torch.tensor(generation.seen[generation.read : end + 1].tolist(), device=self.step.tokens.device)
        hidden = self.step.read(generation.slot, ids[None, :-1])  # raises ValueError for decays that are not finite
        if generation.scores is not None:
            generation.scores.add(self.step.model, hidden, ids[1:])
        self.num_tokens += end - generation.read
        generation.read = end
        if self.drafter is not None:
            self.drafter.index(generation.slot, generation.seen, end)
        if end == place:
            branch = end == generation.shared_end or generation.unread > 0
            needed = any(other.awaited == (generation, end) for other in self.stages.reading)
            return self.keep_prefix(generation, branch=branch, needed=needed)
        if self.prefix_interval is not None and end % self.prefix_interval == 0:
            return self.keep_prefix(generation)
        return None
