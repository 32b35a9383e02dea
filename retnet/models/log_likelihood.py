"""Negative log-likelihood of a text per token, with the state carried over any length."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState

SCORE_BLOCK = 2048  # tokens per call: bounds the memory of the logits


@torch.no_grad()
def score(
    model: LanguageModel,
    ids: Tensor,
    state: ModelState | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, ModelState | None]:
    """Nats of every token but the first, [B, T - 1] float32, for ids [B, T]; and the state before the last token.

    The whole text is one context: each block continues from the state of the block before it. on_tokens: gets the
    number of tokens of every block that has been scored.
    """
    nats = []
    for start in range(0, ids.shape[1] - 1, SCORE_BLOCK):
        block = ids[:, start : start + SCORE_BLOCK + 1]
        output = model(block[:, :-1], state, carry=True)
        state = output.state
        nats.append(F.cross_entropy(output.logits.float().transpose(1, 2), block[:, 1:], reduction="none"))
        on_tokens(block.shape[1] - 1)
    return torch.cat(nats, 1) if nats else torch.empty(ids.shape[0], 0), state
