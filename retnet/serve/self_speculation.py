"""Self-speculation: the draft tokens are guesses of the model's own multi-token prediction (`layers/multi_token.py`).

Module 1 reads the last token beside the hidden state before it, which the state keeps, and guesses the next token; the
following modules read the guesses. The guesses change no state. The pass that checks them also gives the hidden states
that the modules read next, so that the states of the modules follow the accepted tokens as those of the layers do, and
are in snapshots and cached prefixes with them.

A guess is drawn with the random number of its position, as the model's own token will be: where both distributions are
alike, both take the same token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retnet.models.decode.sampling import Sampled, SamplingParts
from retnet.models.decode.step import write_back_
from retnet.serve.drafting import Drafter
from retnet.serve.speculation import VerifyStep


class SelfVerifyStep(VerifyStep):
    """A verify step over states with those of multi-token prediction, which also makes the drafts."""

    def guess(self, parts: SamplingParts) -> list[list[int]]:
        """Guesses [S, W - 1] of the tokens after each slot's last one. Penalties count what was there before them."""
        parts = parts._replace(masks=False, logprobs=False)
        return self._result("guess", self._guess, parts).tokens.tolist()

    @torch.no_grad()
    def _guess(self, parts: SamplingParts) -> Sampled:
        def choose(logits: Tensor, number: int) -> Tensor:
            return self.table.sample(logits, self.state.position + number, parts).tokens

        return Sampled(self.model.guess(self.tokens, self.state, self.drafts.shape[1], choose))

    @torch.no_grad()
    def read(self, slot: int, ids: Tensor) -> Tensor:
        before = self.state.slot(slot)
        hidden = super().read(slot, ids)
        after = self.model.ahead(hidden[None], ids, before, carry=True, in_place=True).states
        write_back_(slot, self.state.mtp, before.mtp, after)
        return hidden


class ModelDrafter(Drafter):
    """The guesses of a step, made for all slots at once."""

    def __init__(self, step: SelfVerifyStep):
        self._step = step
        self._guesses: list[list[int]] = []

    def prepare(self, parts: SamplingParts) -> None:
        self._guesses = self._step.guess(parts)

    def draft(self, slot: int, seen: Sequence[int], count: int) -> list[int]:
        return self._guesses[slot][: max(0, count)]
