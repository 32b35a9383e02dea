"""Decoding: one step for all running requests, the tokens that each keeps, and the reason why an output ends."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from retnet.models.decode.sampling import Sampled, SamplingParts
from retnet.models.decode.step import FAILED, DecodeStep
from retnet.serve.pool import SlotPool
from retnet.serve.request import Generation, TokenLogprobs
from retnet.serve.speculation import Drafter, VerifyStep

NOT_FINITE = "the logits of token {} are not finite: its state or the weights are not"


@dataclass
class StepResults:
    """Results of one step: the new tokens of each request that got some, and the requests that ended, with reasons."""

    new: list[tuple[Generation, list[int]]] = field(default_factory=list)
    ended: list[tuple[Generation, str]] = field(default_factory=list)


class Decoding:
    """The running requests by slot. Every step decodes all slots; those without a request are masked."""

    def __init__(self, step: DecodeStep, pool: SlotPool, drafter: Drafter | None, eos_token_ids: Collection[int]):
        self.step, self.pool, self.drafter, self.eos_token_ids = step, pool, drafter, eos_token_ids
        self.running: dict[int, Generation] = {}
        self.num_new = self.num_accepted = 0  # tokens of outputs so far; those of them that were drafted
        self._parts: SamplingParts | None = None  # needed by the running requests; None: to be determined

    def start(self, generation: Generation) -> None:
        """Let a request whose prompt is read, but for the last token, take part in the steps."""
        slot = generation.slot
        assert slot is not None
        seen = torch.frombuffer(generation.seen, dtype=torch.int32).long()
        output = seen[generation.counted_from :]
        self.step.table.fill(slot, generation.request.sampling, generation.seed, seen, output)
        self.step.tokens[slot] = generation.seen[-1]
        self.step.active[slot] = True
        self.running[slot] = generation
        self._parts = None

    def remove(self, generation: Generation) -> None:
        """Take a request out of the steps."""
        assert generation.slot is not None
        del self.running[generation.slot]
        self._parts = None
        self.step.active[generation.slot] = False

    def run(self, fail: Callable[[Generation, str], None]) -> StepResults:
        """Decode once. fail: called for a request that has to leave before the others can be decoded."""
        results = StepResults()
        if not self.running:
            return results
        drafts = self._draft()
        sampled = self._sample(fail)
        tokens = sampled.tokens.tolist()
        counts = [0] * self.pool.num_slots
        for slot, generation in list(self.running.items()):
            if generation.finished:  # cancelled by the `decode` of another request
                continue
            first = len(generation.seen)
            reason = self._accept_all(generation, slot, tokens[slot], drafts.get(slot, []), sampled)
            new = generation.seen[first:].tolist()
            generation.read = len(generation.seen) - 1
            counts[slot] = len(new)
            self.num_accepted += max(0, len(new) - 1)
            if new:
                results.new.append((generation, new))
            if reason is not None and not generation.finished:
                results.ended.append((generation, reason))
        self.step.settle(counts)
        return results

    def _sample(self, fail: Callable[[Generation, str], None]) -> Sampled:
        try:
            return self.step(self._needed_parts())
        except ValueError:
            # A CPU refuses decays that are NaN. A draft changes no state, so it can run again without the broken ones.
            broken = [g for slot, g in self.running.items() if not self.pool.state.slot(slot).is_finite]
            if self.drafter is None or not broken:
                raise
            for generation in broken:
                fail(generation, NOT_FINITE.format(len(generation.seen)))
            return self.step(self._needed_parts())

    def _needed_parts(self) -> SamplingParts:
        if self._parts is None:
            self._parts = SamplingParts.union(g.request.sampling.parts for g in self.running.values())
        return self._parts

    def _draft(self) -> dict[int, list[int]]:
        """Draft tokens by slot, no more than the request still asks for."""
        if self.drafter is None or not isinstance(self.step, VerifyStep):
            return {}
        drafts = {}
        for slot, generation in self.running.items():
            limit, most = generation.request.max_new_tokens, self.step.drafts.shape[1]
            count = most if limit is None else min(most, limit - generation.num_new - 1)
            drafts[slot] = self.drafter.draft(slot, generation.seen, count)
        self.step.set_drafts(drafts)
        return drafts

    def _accept_all(
        self, generation: Generation, slot: int, tokens: list[int], draft: list[int], sampled: Sampled
    ) -> str | None:
        """Add a slot's tokens up to the first that differs from the draft; returns why the output ends, if it does."""
        reason = None
        for t, (token, drafted) in enumerate(zip(tokens, [*draft, None])):
            reason = self._accept(generation, token, sampled, (slot, t))
            if reason is not None or token != drafted:
                break
        return reason

    def _accept(self, generation: Generation, token: int, sampled: Sampled, place: tuple[int, int]) -> str | None:
        """Add the token at `place` [slot, t] to a request; returns why the output ends, if it does."""
        if token == FAILED:
            generation.error = NOT_FINITE.format(len(generation.seen))
            return "failed"
        request = generation.request
        generation.seen.append(token)
        self.num_new += 1
        _report_logprobs(generation, sampled, place)
        if token in request.stop_tokens or (not request.ignore_eos and token in self.eos_token_ids):
            return "stop_token"
        if generation.stops is not None:
            try:
                matched = generation.stops.push(token)
            except Exception as error:  # from the caller's `decode`: other requests must not lose their tokens
                generation.error = f"its text cannot be decoded: {error!r}"
                return "failed"
            if matched is not None:
                return "stop_string"
        if request.max_new_tokens is not None and generation.num_new >= request.max_new_tokens:
            return "length"
        return None


def _report_logprobs(generation: Generation, sampled: Sampled, place: tuple[int, int]) -> None:
    wanted = generation.request.sampling.logprobs
    if wanted is None or sampled.logprobs is None:
        return
    assert sampled.top_tokens is not None
    assert sampled.top_logprobs is not None
    top = zip(sampled.top_tokens[place][:wanted].tolist(), sampled.top_logprobs[place][:wanted].tolist())
    generation.logprobs.append(TokenLogprobs(float(sampled.logprobs[place]), dict(top)))
