"""A plain generation loop: prompt in chunkwise form, then one token at a time in recurrent form with O(1) state."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState

PROMPT_BLOCK = 2048  # prompt tokens a call: bounds the memory of a long prompt's activations


@torch.no_grad()
def prefill(model: LanguageModel, ids: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
    """Read a prompt [B, T], T >= 1, in blocks. Returns the last token's logits [B, vocab] and the state after it."""
    if ids.shape[1] == 0:
        raise ValueError(f"ids has shape {list(ids.shape)}; accepted: at least one token")
    *blocks, last = ids.split(PROMPT_BLOCK, 1)
    for block in blocks:
        _, state = model.hidden(block, state, carry=True)
    hidden, state = model.hidden(last, state, carry=True)
    return model.logits(hidden[:, -1]), cast(ModelState, state)


def generate(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int | None = None,
    *,
    state: ModelState | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield new tokens [B] one after another after the prompt ids [B, T]; endless if max_new_tokens is None.

    temperature 0 is greedy. `state` continues earlier tokens and is not changed.
    """
    check_sampling(temperature, top_k, top_p)
    logits, state = prefill(model, ids, state)
    count = 0
    while max_new_tokens is None or count < max_new_tokens:
        token = sample(logits, temperature, top_k, top_p, generator)
        yield token
        count += 1
        if count != max_new_tokens:
            logits, state = _next(model, token, state)


@torch.no_grad()
def _next(model: LanguageModel, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    output = model(token[:, None], state, carry=True, in_place=True)
    return output.logits[:, -1], output.state


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for sampling options out of range."""
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; accepted: 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; accepted: 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; accepted: 0 < top_p <= 1")


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token [B] a row of logits [B, vocab]: temperature, then the k likeliest, then the nucleus of mass p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        # The token that crosses p stays in: drop what had reached p before it.
        dropped = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
