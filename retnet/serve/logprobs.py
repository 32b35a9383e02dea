"""Log-probabilities of tokens, by the model's own distribution; those of a prompt are computed chunk by chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retnet.models.lm import LanguageModel
from retnet.ops.dtypes import wide_dtype

LOGITS_AT_ONCE = 2**24  # bounds the memory of the logits of a prompt chunk


@dataclass
class TokenLogprobs:
    """Natural log of the model's probability of a token, and of the likeliest tokens in falling order."""

    logprob: float
    top: dict[int, float]


class PromptLogprobs:
    """Log-probabilities of a prompt's tokens, each with those of the num_top likeliest tokens at its place.

    They are kept as tensors on the host: 4 bytes per token, and 8 per alternative.
    """

    def __init__(self, num_top: int):
        self.num_top = num_top
        self._chunks: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, model: LanguageModel, hidden: Tensor, tokens: Tensor) -> None:
        """Add tokens [T], given the final hidden states [T, D] of the tokens before each. Raises ValueError if the
        logits are not finite."""
        rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
        for states, targets in zip(hidden.split(rows), tokens.split(rows), strict=True):
            logits = model.logits(states)
            if not bool(logits.amax(-1).isfinite().all()):
                raise ValueError("logits of the prompt are not finite: its state or the weights are not")
            logprobs = logits.to(wide_dtype(logits.dtype)).log_softmax(-1)
            top = logprobs.topk(min(self.num_top, model.config.vocab_size), -1)
            own = logprobs.gather(-1, targets[:, None])[:, 0]
            self._chunks.append((own.cpu(), top.indices.int().cpu(), top.values.cpu()))

    def tolist(self) -> list[TokenLogprobs]:
        """Those of the tokens so far."""
        return [
            TokenLogprobs(logprob, dict(zip(tokens, logprobs, strict=True)))
            for chunk in self._chunks
            for logprob, tokens, logprobs in zip(*(x.tolist() for x in chunk), strict=True)
        ]
