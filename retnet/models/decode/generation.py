"""Plain generation: read the prompt in chunks, then decode one token at a time with a state of constant size.

One batch of equal prompts, without an engine. Tokens are sampled as the engine samples them: with the same seed and
logits both pick the same token.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from retnet.models.decode.decoder import FusedDecoder, running
from retnet.models.decode.sampling import Sampling, SamplingTable
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState

PROMPT_CHUNK = 2048  # tokens per call: bounds the memory of a long prompt's activations


@torch.no_grad()
def prefill(model: LanguageModel, ids: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
    """Read a prompt [B, T], T >= 1, in chunks. Returns the logits [B, vocab] of its last token and the state after it.

    A given state is continued and not changed.
    """
    if ids.shape[1] == 0:
        raise ValueError(f"ids has shape {list(ids.shape)}; accepted: at least one token")
    *chunks, last = ids.split(PROMPT_CHUNK, 1)
    for chunk in chunks:
        _, state = model.hidden(chunk, state, carry=True)
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
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield new tokens [B] one after another after the prompt ids [B, T]; without end if max_new_tokens is None.

    Args:
        state: continues earlier tokens; it is not changed.
        temperature, top_k, top_p, min_p: as in `Sampling`; temperature 0 is greedy.
        generator: draws one seed per row, from which all random numbers of that row follow.

    Outside training the weights of a model that fits are packed in place (`models/decode/packing.py`).
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    return _generate(model, ids, max_new_tokens, state, sampling, generator)


def _generate(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int | None,
    state: ModelState | None,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    if max_new_tokens is not None and max_new_tokens < 1:
        return
    table = SamplingTable(len(ids), model.config.vocab_size, ids.device, shard=model.shard)
    table.fill_alike(sampling, _seeds(len(ids), generator))
    with running(model):
        logits, state = prefill(model, ids, state)
    decoder = FusedDecoder(model)
    count = 0
    while True:
        token = table.sample(logits, state.position, sampling.parts).tokens
        yield token
        count += 1
        if count == max_new_tokens:
            return
        logits, state = _decode(decoder, token, state)


@torch.no_grad()
def _decode(decoder: FusedDecoder, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    with running(decoder.model):
        fused = decoder.step(token, state)
        if fused is not None:
            return fused
        output = decoder.model(token[:, None], state, carry=True, in_place=True)
        return output.logits[:, -1], cast(ModelState, output.state)


def _seeds(count: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device)
