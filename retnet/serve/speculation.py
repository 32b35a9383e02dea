"""Speculative decoding: draft tokens are checked several at a time. They come from the context (`drafting.py`) or from
the model's own multi-token prediction (`self_speculation.py`).

Every step reads W tokens per slot (the last token and the draft tokens) in one pass over the weights. It samples after
each of them as plain decoding would, with the same random numbers. Draft tokens are accepted as long as they equal the
samples.
So greedy output is that of plain decoding, and sampled output has its distribution (with the same seed, the same text),
up to the rounding of products with W rows instead of one. States are updated only after acceptance, stop strings
included, so rejected tokens never touch them.

The shapes do not depend on whether there is a draft, so a request keeps its bits whatever else is in the batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from retnet.layers.block import BlockConfig
from retnet.layers.mixers import mixer_of
from retnet.models.config import ModelConfig
from retnet.models.decode.sampling import Sampled, SamplingParts, SamplingTable
from retnet.models.decode.step import DecodeStep
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelDraft, ModelState
from retnet.serve.lookup import PromptLookup, table_entries
from retnet.system.checks import is_integer, quoted
from retnet.system.choices import check_choices

LONGEST_DRAFT = 1023  # tokens; a step of more is a prompt
LONGEST_LOOKUP = 64  # tokens
DRAFTS = ("auto", "mtp", "context")  # what users may ask for


@dataclass(frozen=True)
class Speculation:
    """draft_tokens: drafted per step.

    source: "context" takes what followed the last few tokens at an earlier place; "mtp" lets the model's modules of
    multi-token prediction guess.
    longest: tokens of the n-gram that is looked up; shorter ones are tried next.
    """

    draft_tokens: int = 7
    longest: int = 3
    source: Literal["context", "mtp"] = "context"

    def __post_init__(self) -> None:
        if not is_integer(self.draft_tokens, 1, LONGEST_DRAFT) or (self.draft_tokens + 1) % 4:
            raise ValueError(
                f"draft_tokens is {quoted(self.draft_tokens)}; accepted: 3, 7, 11, ... "
                f"{LONGEST_DRAFT} (a multiple of 4, less 1)"
            )
        if not is_integer(self.longest, 1, LONGEST_LOOKUP):
            raise ValueError(f"longest is {quoted(self.longest)}; accepted: an integer of 1 to {LONGEST_LOOKUP}")
        check_choices(self)
        for name in ("draft_tokens", "longest"):
            object.__setattr__(self, name, int(getattr(self, name)))

    @classmethod
    def of(cls, draft_tokens: int, drafts: str, config: ModelConfig) -> "Speculation | None":
        """As users ask for it: None for 0 tokens. drafts: a source, or "auto" for mtp where the model has it."""
        if drafts not in DRAFTS:
            raise ValueError(f"drafts is {quoted(drafts)}; accepted: {', '.join(DRAFTS)}")
        if not draft_tokens:
            return None
        found = "context" if config.mtp is None else "mtp"
        return cls(draft_tokens, source=found if drafts == "auto" else drafts)  # type: ignore[arg-type]

    @property
    def uses_mtp(self) -> bool:
        return self.source == "mtp"

    def grows(self, config: ModelConfig) -> bool:
        """Whether drafts come from modules whose cache grows with every token."""
        return self.uses_mtp and config.mtp is not None and config.mtp.block.mixer.kept_tokens == math.inf

    def index_bytes(self, max_tokens: int | None) -> int:
        """Memory of one slot's index of n-grams."""
        if self.uses_mtp:
            return 0
        return PromptLookup.bytes_of(self.longest, table_entries(max_tokens))

    def check(self, config: ModelConfig, max_tokens: int | None) -> None:
        """Raise ValueError for a model whose caches have no room for a draft, or that cannot make the drafts."""
        width = self.draft_tokens + 1
        layers = [(f"layer {i}", layer) for i, layer in enumerate(config.layers)]
        if self.uses_mtp:
            layers.append(("mtp.block", _checked_block(config, max_tokens)))
        for place, layer in layers:
            kept = min((mixer.kept_tokens for mixer in layer.mixer.leaves if mixer.kept_tokens), default=0)
            room = min(kept, math.inf if max_tokens is None else max_tokens)
            if kept and room < width:
                raise ValueError(
                    f"{place} is {layer.mixer.kind}, which keeps {room} tokens; accepted with draft_tokens "
                    f"{self.draft_tokens}: at least {width}"
                )


def _checked_block(config: ModelConfig, max_tokens: int | None) -> BlockConfig:
    """The block of multi-token prediction. Raises ValueError unless drafts can come from it."""
    if config.mtp is None:
        raise ValueError("drafts come from mtp, which the model does not have; accepted for it: context")
    block = config.mtp.block
    without = [leaf.kind for leaf in block.mixer.leaves if mixer_of(leaf).draft is None]
    if without or not block.keeps_state:
        why = f"is {without[0]}, which has no drafts" if without else "has keeps_state False"
        raise ValueError(f"drafts come from mtp, whose block {why}; accepted for this model: context")
    if block.mixer.kept_tokens == math.inf and max_tokens is None:
        raise ValueError(
            f"drafts come from mtp, whose block is {block.mixer.kind} without a window, whose state grows; accepted: "
            "max_tokens, the tokens that a slot has room for, or drafts from the context"
        )
    return block


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
