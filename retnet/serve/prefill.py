"""Prefill: prompts are read in chunks, in turn, within a budget of tokens per step; prefixes go into the cache.

Chunks end at fixed places (multiples of the chunk size, the end of what a prompt shares with others, the token before
its last), so that the state after a prompt has the same bits whatever else is read.
"""

from collections.abc import Callable

import torch

from retnet.models.decode.step import DecodeStep
from retnet.serve.pool import SlotPool
from retnet.serve.prefix import PrefixCache
from retnet.serve.request import Generation, Status
from retnet.serve.speculation import Drafter
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

    def enter(self, generation: Generation) -> None:
        """Give a waiting generation a slot that holds the state of its snapshot or of the longest cached prefix."""
        state = None if generation.start is None else generation.start.state
        if self.prefixes is not None:
            found = self.prefixes.find(generation.seen[:-1], generation.read)
            if found is not None:
                generation.cached = found[0] - generation.read
                generation.read, state = found
        generation.slot = self.pool.take(state)
        generation.start = None
        if self.drafter is not None and generation.slot is not None:
            self.drafter.enter(generation.slot)
        self.stages.reading.append(generation)
        generation.status = Status.READING

    def run(self, start: Callable[[Generation], None], fail: Callable[[Generation, str], None]) -> None:
        """Read within the budget. start: called for each prompt that is read; fail: for one that cannot be read."""
        left, stages = self.budget, self.stages
        while stages.reading:
            generation = stages.reading[0]
            end = self._chunk_end(generation)
            if end - generation.read > left < self.budget:
                return
            left -= end - generation.read
            stages.in_doubt = (generation,)
            try:
                if generation.unread:
                    self._read(generation, end)
            except Exception as error:  # from this request alone: no other is in the call
                fail(generation, f"its prompt cannot be read: {str(error) or repr(error)}")
                continue
            stages.reading.popleft()
            if generation.unread:
                stages.reading.append(generation)
            else:
                start(generation)
            stages.in_doubt = ()

    def keep_prefix(self, generation: Generation) -> None:
        """Put the state after the tokens read so far into the prefix cache, unless it is there or is not finite."""
        if self.prefixes is None or generation.slot is None or not generation.read or self.weights.changed:
            return
        tokens = generation.seen[: generation.read]
        if not self.prefixes.has(tokens):
            state = self.pool.copy(generation.slot)
            if int(state.position) != generation.read:
                raise RuntimeError(
                    f"the state has read {int(state.position)} tokens, not the request's {generation.read}"
                )
            if state.is_finite:  # otherwise every prompt with this prefix would fail
                self.prefixes.store(tokens, state)

    def _chunk_end(self, generation: Generation) -> int:
        boundary = (generation.read // self.chunk + 1) * self.chunk
        if generation.read < generation.shared_end < boundary:
            boundary = generation.shared_end
        return min(boundary, len(generation.seen) - 1)

    def _read(self, generation: Generation, end: int) -> None:
        assert generation.slot is not None
        ids = torch.tensor([generation.seen[generation.read : end].tolist()], device=self.step.tokens.device)
        self.step.read(generation.slot, ids)  # raises ValueError for decays that are not finite
        self.num_tokens += end - generation.read
        generation.read = end
        if self.drafter is not None:
            self.drafter.index(generation.slot, generation.seen, end)
        inside = self.prefix_interval is not None and end % self.prefix_interval == 0
        if inside or end in (generation.shared_end, len(generation.seen) - 1):
            self.keep_prefix(generation)
