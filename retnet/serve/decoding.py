"""Decoding: one step for all running requests, the tokens that each keeps, and the reason why an output ends."""

from collections.abc import Iterable

import torch

from retnet.models.decode.sampling import Sampled, SamplingParts
from retnet.models.decode.step import FAILED, DecodeStep
from retnet.serve.constrained import GrammarFailed
from retnet.serve.drafting import Drafter
from retnet.serve.pool import SlotPool
from retnet.serve.request import Generation, TokenLogprobs
from retnet.serve.speculation import VerifyStep
from retnet.serve.stages import Stages

NOT_FINITE = "the logits of token {} are not finite: its state or the weights are not"


class Decoding:
    """The steps of the running requests. Every step decodes all slots; those without a request are masked."""

    def __init__(self, step: DecodeStep, pool: SlotPool, stages: Stages, drafter: Drafter | None):
        self.step, self.pool, self.stages, self.drafter = step, pool, stages, drafter
        self.num_new = self.num_drafted = self.num_accepted = 0  # tokens of outputs, drafts, and both
        self._parts: SamplingParts | None = None  # needed by the running requests; None: to be determined
        self._without_draft: set[int] = set()  # slots whose last draft gave no finite logits

    def start(self, generation: Generation) -> None:
        """Let a request whose prompt is read, but for the last token, take part in the steps."""
        assert generation.slot is not None
        self._parts = None
        self._fill(generation)
        self.step.active[generation.slot] = True
        self.stages.decoding[generation.slot] = generation

    def remove(self, slot: int) -> None:
        """Take a slot out of the steps."""
        self._parts = None
        self._without_draft.discard(slot)
        self.step.active[slot] = False

    def keep_only(self, slots: Iterable[int]) -> None:
        """Take all slots but these out of the steps."""
        self._parts = None
        self._without_draft.clear()
        taking_part = torch.zeros_like(self.step.active)
        taking_part[list(slots)] = True
        self.step.active.copy_(taking_part)

    def run(self) -> list[tuple[Generation, list[int]]]:
        """Decode once. Returns the new tokens of each request; one whose output has ended has a finish_reason."""
        running, results = self.stages.decoding, []
        if not running:
            return results
        self.stages.in_doubt = tuple(running.values())
        parts, drafts = self._needed_parts(), self._draft()
        if parts.masks:
            self._mask(drafts)
        if isinstance(self.step, VerifyStep):
            self.step.set_drafts(drafts)
            self.num_drafted += sum(map(len, drafts.values()))
        sampled = self.step(parts)
        tokens = sampled.tokens.tolist()
        counts = [0] * self.pool.num_slots
        for slot, generation in running.items():
            if generation.finish_reason is not None:
                continue  # its grammar failed before the step
            first = len(generation.seen)
            self._accept_all(generation, slot, tokens[slot], drafts.get(slot, []), sampled)
            new = generation.seen[first:].tolist()
            generation.read = len(generation.seen) - 1
            counts[slot] = len(new)
            self.num_accepted += max(0, len(new) - 1)
            if new:
                results.append((generation, new))
        self.step.settle(counts)
        for slot in self._without_draft:
            self._fill(running[slot])
        self.stages.in_doubt = ()
        return results

    def _fill(self, generation: Generation) -> None:
        """Set a slot's sampling options and counts, and its last token."""
        slot, counted = generation.slot, generation.request.counted
        assert slot is not None
        seen = torch.frombuffer(generation.seen, dtype=torch.int32).long()
        output = seen[generation.counted_from :]
        if counted is not None:
            seen = torch.cat([torch.tensor(counted, dtype=torch.long), output])
        self.step.table.fill(slot, generation.request.sampling, generation.seed, seen, output)
        self.step.tokens[slot] = generation.seen[-1]

    def _needed_parts(self) -> SamplingParts:
        if self._parts is None:
            self._parts = SamplingParts.union(g.request.parts for g in self.stages.decoding.values())
        return self._parts

    def _draft(self) -> dict[int, list[int]]:
        """Draft tokens by slot, no more than the request still asks for."""
        if self.drafter is None or not isinstance(self.step, VerifyStep):
            return {}
        self.drafter.prepare(self._needed_parts())
        drafts = {}
        for slot, generation in self.stages.decoding.items():
            limit, most = generation.request.max_new_tokens, self.step.drafts.shape[1]
            count = most if limit is None else min(most, limit - generation.num_new - 1)
            count = 0 if slot in self._without_draft else count
            drafts[slot] = self.drafter.draft(slot, generation.seen, count)
        self._without_draft.clear()
        return drafts

    def _mask(self, drafts: dict[int, list[int]]) -> None:
        """Fill the masks of all requests with a grammar, and cut their drafts where it refuses a token."""
        masked = []
        for slot, generation in self.stages.decoding.items():
            if generation.constraint is None:
                continue
            masked.append(slot)
            try:
                draft = generation.constraint.fill(self.step.table.host_masks(slot), drafts.get(slot, []))
            except GrammarFailed as error:
                generation.error, generation.finish_reason, draft = str(error), "failed", []
            if drafts:
                drafts[slot] = draft
        self.step.table.upload_masks(masked)

    def _accept_all(
        self, generation: Generation, slot: int, tokens: list[int], draft: list[int], sampled: Sampled
    ) -> None:
        """Add a slot's tokens up to the first that differs from the draft, or to the one that ends the output."""
        for t, (token, drafted) in enumerate(zip(tokens, [*draft, None])):
            if token == FAILED and draft:  # a drafted token may be at fault, even one after the last that is right
                self._without_draft.add(slot)
                return
            try:
                generation.finish_reason = self._accept(generation, token, sampled, (slot, t))
            except GrammarFailed as error:
                generation.error, generation.finish_reason = str(error), "failed"
            if generation.finish_reason is not None or token != drafted:
                return

    def _accept(self, generation: Generation, token: int, sampled: Sampled, place: tuple[int, int]) -> str | None:
        """Add the token at `place` [slot, t] to a request; returns why the output ends, if it does. Raises
        GrammarFailed."""
        if token == FAILED:
            generation.error = NOT_FINITE.format(len(generation.seen))
            return "failed"
        request = generation.request
        if generation.constraint is not None and token not in generation.ends:
            generation.constraint.push(token)
        generation.add(token)
        self.num_new += 1
        _report_logprobs(generation, sampled, place)
        if token in generation.ends:
            return "stop_token"
        if generation.stops is not None:
            try:
                matched = generation.stops.push(token)
            except Exception as error:  # from the caller's `decode`: other requests must not lose their tokens
                generation.error = f"its text cannot be decoded: {error!r}"
                return "failed"
            if matched is not None:
                return "stop_string"
        if generation.constraint is not None and generation.constraint.ended:
            return "grammar_end"
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
