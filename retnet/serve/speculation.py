"""Speculative decoding by prompt lookup: the draft is the text that followed the last few tokens at an earlier place.

Every step reads W tokens per slot (the last token and the draft tokens) in one pass over the weights. It samples after
each of them as plain decoding would, with the same random numbers. Draft tokens are accepted as long as they equal the
samples.
So greedy output is that of plain decoding, and sampled output has its distribution (with the same seed, the same text),
up to the rounding of products with W rows instead of one. States are updated only after acceptance, stop strings
included, so rejected tokens never touch them.

The shapes do not depend on whether there is a draft, so a request keeps its bits whatever else is in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from retnet.models.config import ModelConfig
from retnet.models.decode.sampling import Sampled, SamplingParts, SamplingTable
from retnet.models.decode.step import DecodeStep
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelDraft, ModelState
from retnet.serve.lookup import PromptLookup, table_entries
from retnet.system.checks import is_integer, quoted

LONGEST_DRAFT = 1023  # tokens; a step of more is a prompt
LONGEST_LOOKUP = 64  # tokens


@dataclass(frozen=True)
class Speculation:
    """draft_tokens: drafted per step. longest: tokens of the n-gram that is looked up; shorter ones are tried next."""

    draft_tokens: int = 7
    longest: int = 3

    def __post_init__(self) -> None:
        if not is_integer(self.draft_tokens, 1, LONGEST_DRAFT) or (self.draft_tokens + 1) % 4:
            raise ValueError(
                f"draft_tokens is {quoted(self.draft_tokens)}; accepted: 3, 7, 11, ... "
                f"{LONGEST_DRAFT} (a multiple of 4, less 1)"
            )
        if not is_integer(self.longest, 1, LONGEST_LOOKUP):
            raise ValueError(f"longest is {quoted(self.longest)}; accepted: an integer of 1 to {LONGEST_LOOKUP}")
        for name in ("draft_tokens", "longest"):
            object.__setattr__(self, name, int(getattr(self, name)))

    def index_bytes(self, max_tokens: int | None) -> int:
        """Memory of one slot's index of n-grams."""
        return PromptLookup.bytes_of(self.longest, table_entries(max_tokens))

    def check(self, config: ModelConfig, max_tokens: int | None) -> None:
        """Raise ValueError for a model whose caches have no room for a draft."""
        width = self.draft_tokens + 1
        for i, layer in enumerate(config.layers):
            kept = min((mixer.kept_tokens for mixer in layer.mixer.leaves if mixer.kept_tokens), default=0)
            room = min(kept, math.inf if max_tokens is None else max_tokens)
            if kept and room < width:
                raise ValueError(
                    f"layer {i} is {layer.mixer.kind}, which keeps {room} tokens; accepted with draft_tokens "
                    f"{self.draft_tokens}: at least {width}"
                )


class Drafter:
    """Draft tokens for the requests in their slots."""

    def __init__(self, speculation: Speculation, num_slots: int, max_tokens: int | None):
        entries = table_entries(max_tokens)
        self.lookups = [PromptLookup(speculation.longest, entries) for _ in range(num_slots)]

    def enter(self, slot: int) -> None:
        self.lookups[slot].clear()

    def index(self, slot: int, seen: Sequence[int], length: int) -> None:
        """Index the first `length` tokens of a prompt."""
        self.lookups[slot].index(seen, length)

    def draft(self, slot: int, seen: Sequence[int], count: int) -> list[int]:
        """At most `count` draft tokens after those seen."""
        return self.lookups[slot].draft(seen, count) if count > 0 else []


class VerifyStep(DecodeStep):
    """A decode step that checks drafts [S, W - 1] after each slot's last token; the first lengths [S] are drafted."""

    def __init__(self, model: LanguageModel, state: ModelState, table: SamplingTable, graphs: bool, width: int):
        super().__init__(model, state, table, graphs)
        self.drafts = self.tokens.new_zeros(len(self.tokens), width - 1)
        self.lengths = torch.zeros_like(self.tokens)
        self._updates: dict[SamplingParts, ModelDraft] = {}
        self._last = SamplingParts()

    def set_drafts(self, drafts: dict[int, list[int]]) -> None:
        """Set the draft tokens of the next step, by slot. Behind them, the slot's last token is repeated."""
        num_slots, longest = self.drafts.shape
        padded = [(drafts.get(slot, []) + [-1] * longest)[:longest] for slot in range(num_slots)]
        given = torch.tensor(padded, device=self.tokens.device)
        self.drafts.copy_(torch.where(given < 0, self.tokens[:, None], given))
        lengths = [len(drafts.get(slot, [])) for slot in range(num_slots)]
        self.lengths.copy_(torch.tensor(lengths, device=self.lengths.device))

    def __call__(self, parts: SamplingParts) -> Sampled:
        """Tokens [S, W] on the host; each slot's are valid up to the first that differs from its draft."""
        self._last = parts
        if not self.graphs:
            self._updates.clear()  # those of other sampling parts
        return super().__call__(parts)

    @torch.no_grad()
    def settle(self, counts: list[int]) -> None:
        """Update each slot's state with the first counts [S] tokens of the last call."""
        self._updates[self._last].accept_(self.state, torch.tensor(counts, device=self.tokens.device))

    @torch.no_grad()
    def _run(self, parts: SamplingParts) -> Sampled:
        if not self.graphs:  # a graph writes into the updates of its capture
            self._updates.clear()
        hidden, self._updates[parts] = self.model.draft(torch.cat([self.tokens[:, None], self.drafts], 1), self.state)
        position, accepted = self.state.position + 1, self.active
        columns = []
        for t, logits in enumerate(self.model.logits(hidden).unbind(1)):
            columns.append(self._pick(logits, position + t, accepted, parts, t))
            if t < self.drafts.shape[1]:
                accepted = accepted & (columns[t].tokens == self.drafts[:, t]) & (t < self.lengths)
        tokens, *others = zip(*columns, strict=True)
        return Sampled(torch.stack(tokens, 1), *(None if x[0] is None else torch.stack(x, 1) for x in others))
