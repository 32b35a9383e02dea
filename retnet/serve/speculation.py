"""Speculative decoding by prompt lookup: the text that followed the last few tokens before is guessed to follow again.

Every step reads W tokens a slot, the last one and a draft, in one pass over the weights, and samples after each as
decoding one by one would, with the same random numbers. The draft is right as far as it equals what was sampled. So
greedy output is that of plain decoding, and sampled output has its distribution (with the same seed it is the same
text), up to the rounding of products with W rows instead of one. States are written once it is known how much was
right, stop strings included: rows of the draft that was wrong never touch them.

The shapes do not depend on whether there was anything to guess: a request's bits stay its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from retnet.models.config import ModelConfig
from retnet.models.decode.sampling import Sampled, SamplingParts, SamplingTable
from retnet.models.decode.step import DecodeStep
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelDraft, ModelState


@dataclass(frozen=True)
class Speculation:
    """draft_tokens guessed a step, after n-grams of `longest` tokens or, failing that, fewer."""

    draft_tokens: int = 7
    longest: int = 3

    def __post_init__(self) -> None:
        if self.draft_tokens < 1 or (self.draft_tokens + 1) % 4:
            raise ValueError(
                f"draft_tokens is {self.draft_tokens}; accepted: 3, 7, 11, ... (with the last token, rows in fours)"
            )
        if self.longest < 1:
            raise ValueError(f"longest is {self.longest}; accepted: a positive integer")

    def check(self, config: ModelConfig, max_tokens: int | None) -> None:
        """Raise ValueError for a model whose caches cannot take a draft."""
        width = self.draft_tokens + 1
        for i, layer in enumerate(config.layers):
            room = min(layer.mixer.kept_tokens, math.inf if max_tokens is None else max_tokens)
            if layer.mixer.kept_tokens and room < width:
                raise ValueError(
                    f"layer {i} is {layer.mixer.kind} that keeps {room} tokens; accepted with draft_tokens "
                    f"{self.draft_tokens}: at least {width}"
                )


@dataclass
class PromptLookup:
    """Where each n-gram of one context was seen last; a step costs its new tokens alone."""

    longest: int
    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    _indexed: int = 0

    def index(self, seen: Sequence[int], length: int) -> None:
        """Take in the first `length` tokens: as a prompt's blocks are read, so that no step waits for all of it."""
        for end in range(self._indexed + 1, length):
            for n in range(1, min(self.longest, end) + 1):
                self._ends[tuple(seen[end - n : end])] = end
        self._indexed = max(self._indexed, length - 1)

    def draft(self, seen: Sequence[int], count: int) -> list[int]:
        """`count` tokens that followed the longest ending of `seen` that occurred before, none if there is none.

        Where they reach the end of `seen`, it goes on in a circle.
        """
        self.index(seen, len(seen))
        for n in range(min(self.longest, len(seen)), 0, -1):
            end = self._ends.get(tuple(seen[-n:]))
            if end is not None:
                return [seen[end + i % (len(seen) - end)] for i in range(count)]
        return []


class Drafter:
    """Draft tokens for the requests in their slots; num_drafted counts them."""

    def __init__(self, speculation: Speculation):
        self.speculation = speculation
        self.lookups: dict[int, PromptLookup] = {}
        self.num_drafted = 0

    def enter(self, slot: int) -> None:
        self.lookups[slot] = PromptLookup(self.speculation.longest)

    def leave(self, slot: int) -> None:
        self.lookups.pop(slot, None)

    def index(self, slot: int, seen: Sequence[int], length: int) -> None:
        """Take in the first `length` tokens of a prompt."""
        self.lookups[slot].index(seen, length)

    def draft(self, slot: int, seen: Sequence[int], count: int) -> list[int]:
        """At most `count` draft tokens after those seen."""
        draft = self.lookups[slot].draft(seen, count) if count > 0 else []
        self.num_drafted += len(draft)
        return draft


class VerifyStep(DecodeStep):
    """drafts [S, W - 1] after each slot's last token, the first `lengths` [S] of them guessed."""

    def __init__(self, model: LanguageModel, state: ModelState, table: SamplingTable, graphs: bool, width: int):
        super().__init__(model, state, table, graphs)
        self.drafts = self.tokens.new_zeros(len(self.tokens), width - 1)
        self.lengths = torch.zeros_like(self.tokens)
        self._rows: dict[SamplingParts, ModelDraft] = {}
        self._last = SamplingParts()

    def set_drafts(self, drafts: dict[int, list[int]]) -> None:
        """The guesses of this step, by slot."""
        num_slots, longest = self.drafts.shape
        padded = [(drafts.get(slot, []) + [0] * longest)[:longest] for slot in range(num_slots)]
        self.drafts.copy_(torch.tensor(padded))
        self.lengths.copy_(torch.tensor([len(drafts.get(slot, [])) for slot in range(num_slots)]))

    def __call__(self, parts: SamplingParts) -> Sampled:
        """Tokens [S, W] on the host; in each row they are right up to the first that differs from the draft."""
        self._last = parts
        return super().__call__(parts)

    @torch.no_grad()
    def settle(self, counts: list[int]) -> None:
        """Let each slot's state read the first counts [S] of the tokens that the last call saw."""
        self._rows[self._last].accept_(self.state, torch.tensor(counts, device=self.tokens.device))

    def _run(self, parts: SamplingParts) -> Sampled:
        hidden, self._rows[parts] = self.model.draft(torch.cat([self.tokens[:, None], self.drafts], 1), self.state)
        position, right = self.state.position + 1, self.active
        columns = []
        for t, logits in enumerate(self.model.logits(hidden).unbind(1)):
            columns.append(self._pick(logits, position + t, right, parts))
            if t < self.drafts.shape[1]:
                right = right & (columns[t].tokens == self.drafts[:, t]) & (t < self.lengths)
        tokens, *others = zip(*columns, strict=True)
        return Sampled(torch.stack(tokens, 1), *(None if x[0] is None else torch.stack(x, 1) for x in others))
