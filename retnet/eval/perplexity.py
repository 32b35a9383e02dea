"""Perplexity of a text: read as one context, or in the windows that models without a state need.

Perplexity per word is comparable between tokenizers: all nats over the words of the text, with one `<eos>` per line, as
is usual for WikiText.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from retnet.data import Tokenizer
from retnet.eval.processes import ALONE, Processes
from retnet.models.lm import LanguageModel
from retnet.models.log_likelihood import score


@dataclass(frozen=True)
class Perplexity:
    """Nats summed over num_tokens tokens, which are num_words words (with one `<eos>` per line) and num_bytes bytes."""

    nats: float
    num_tokens: int
    num_words: int
    num_bytes: int

    @property
    def per_token(self) -> float:
        return _exp(self.nats / self.num_tokens)

    @property
    def per_word(self) -> float:
        return _exp(self.nats / self.num_words)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


def perplexity(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = ALONE,
) -> Perplexity:
    """The perplexity of a text under a model.

    Args:
        context: tokens per window, each read from a fresh state; None: one state for the whole text.
        stride: tokens scored per window, those at its end; `context` (windows side by side) if None.
        on_tokens: gets the number of tokens scored so far, and of all.
        processes: share the windows; one context is read by one process. The sums are those of one process.

    Raises ValueError for an empty text, and for windows that leave tokens out.
    """
    ids = torch.tensor([tokenizer.encode(text, start=True)], device=model.embedding.weight.device)
    num_tokens = ids.shape[1] - 1
    if not num_tokens:
        raise ValueError("there is no text to score; accepted: at least one byte")
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        on_tokens(done, num_tokens)

    if context is None:
        if stride is not None:
            raise ValueError(f"stride is {stride} without a context; accepted: both, or neither")

        def read(share: range) -> list[float]:
            return [score(model, ids, on_tokens=count)[0].double().sum().item() for _ in share]

        nats = processes.run([num_tokens], read)
    else:
        windows = _windows(num_tokens, context, context if stride is None else stride)

        def read(share: range) -> list[float]:
            return [_window_nats(model, ids, windows[i], count) for i in share]

        nats = processes.run([end - begin for begin, _, end in windows], read)
    return Perplexity(sum(nats), num_tokens, count_words(text), len(text.encode()))


def _exp(nats: float) -> float:
    """e to the power of nats; infinity beyond float64, as for a long text of few words."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def _windows(last: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows as (begin, first token that is scored, end).

    They end every `stride` tokens. Each of the `last` tokens is scored once, with at least context - stride before it.
    """
    if context < 1 or not 1 <= stride <= context:
        raise ValueError(f"context is {context} and stride {stride}; accepted: 1 <= stride <= context")
    windows: list[tuple[int, int, int]] = []
    scored = 0
    while scored < last:
        end = min(last, scored + stride if scored else context)
        windows.append((max(0, end - context), scored, end))
        scored = end
    return windows


@torch.no_grad()
def _window_nats(
    model: LanguageModel, ids: torch.Tensor, window: tuple[int, int, int], count: Callable[[int], None]
) -> float:
    begin, scored, end = window
    logits = model(ids[:, begin:end]).logits[0, scored - begin :]
    nats = F.cross_entropy(logits.double(), ids[0, scored + 1 : end + 1], reduction="sum").item()
    count(end - scored)
    return nats


def count_words(text: str) -> int:
    """Words between blanks, and one `<eos>` per line."""
    return sum(len(line.split()) + 1 for line in text.splitlines())
