"""Measurements of a trained language model for `quality.py`: losses by position, on books and of repeats; decoding.

Blocks run uncompiled here, because every measurement has shapes of its own.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from mixers_train import precision
from quality_data import Corpus, Stream
from torch import Tensor

from retnet import Engine, LanguageModel, Request, Sampling
from retnet.models.cost import model_cost

LOGIT_ROWS = 8192  # tokens whose logits are in memory at a time
WARM_UP_STEPS, TIMED_STEPS = 8, 64


@dataclass(frozen=True)
class Sizes:
    """length: tokens trained on. tokens: per forward call. valid_rows: of the final loss; curve_rows: of a curve's
    points. longest, windows: of the loss by position. passage, gaps, repeats: of the recall on text. context: tokens
    before the timed decode steps.
    """

    length: int = 2048
    tokens: int = 65536
    valid_rows: int = 256
    curve_rows: int = 64
    longest: int = 32768
    windows: int = 32
    book_tokens: int = 600_000
    passage: int = 256
    gaps: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    repeats: int = 64
    context: int = 8192


@contextmanager
def measuring(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode, without gradients and compiled code."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), precision(model.embedding.weight.device):
            yield
    finally:
        model.train(was)


def nats(model: LanguageModel, ids: Tensor) -> Tensor:
    """Loss [B, T] of each token of ids [B, T + 1] but the first, float32."""
    hidden, _ = model.hidden(ids[:, :-1].long())
    parts = zip(hidden.flatten(0, 1).split(LOGIT_ROWS), ids[:, 1:].flatten().long().split(LOGIT_ROWS), strict=True)
    losses = [F.cross_entropy(model.logits(part).float(), target, reduction="none") for part, target in parts]
    return torch.cat(losses).view(len(ids), -1)


def row_nats(model: LanguageModel, rows: Tensor, sizes: Sizes) -> Tensor:
    """Losses [rows, T] of rows [rows, T + 1], as many rows per call as the tokens of a call allow."""
    per_call = max(1, sizes.tokens // (rows.shape[1] - 1))
    with measuring(model):
        return torch.cat([nats(model, part) for part in rows.split(per_call)])


def mean_loss(model: LanguageModel, stream: Stream, sizes: Sizes, rows: int) -> float:
    """Mean nats per token over rows of the training length, spread over the stream."""
    return row_nats(model, stream.spread_rows(sizes.length, rows), sizes).double().mean().item()


def by_position(model: LanguageModel, stream: Stream, sizes: Sizes) -> list[tuple[int, float]]:
    """(last position, mean nats) of positions 1-64, 65-128, 129-256, ... in windows up to 16 times as long as a row."""
    losses = row_nats(model, stream.spread_rows(sizes.longest, sizes.windows), sizes).double().mean(0)
    edges = [0, *(2**n for n in range(min(6, sizes.length.bit_length() - 1), sizes.longest.bit_length()))]
    return [(high, losses[low:high].mean().item()) for low, high in pairwise(edges)]


def bits_per_byte(model: LanguageModel, books: Stream, sizes: Sizes, length: int) -> float:
    """Of whole books, read in rows of `length` that each start without context."""
    total, num_bytes, tokens = 0.0, 0, 0
    for index in range(len(books.ends)):
        book = books.document(index)
        if tokens and tokens + len(book) > sizes.book_tokens:
            continue
        tokens, num_bytes = tokens + len(book), num_bytes + books.num_bytes[index]
        whole = (len(book) - 1) // length * length
        if whole:
            total += row_nats(model, book[: whole + 1].unfold(0, length + 1, length), sizes).double().sum().item()
        if whole < len(book) - 1:
            total += row_nats(model, book[None, whole:], sizes).double().sum().item()
    return total / (num_bytes * math.log(2))


def recall(model: LanguageModel, books: Stream, sizes: Sizes) -> list[dict]:
    """Loss of a passage of a book where it comes first, and where it is repeated after a gap of other text.

    A sequence is context, passage, gap, passage; the context is as long as the passage, and the text up to the repeat
    is consecutive.
    """
    N, found = sizes.passage, []
    for gap in sizes.gaps:
        span = 2 * N + gap
        starts = torch.linspace(0, len(books.tokens) - span - 1, sizes.repeats, device=books.tokens.device).long()
        text = books.tokens[starts[:, None] + torch.arange(span, device=starts.device)]
        losses = row_nats(model, torch.cat([text, text[:, N : 2 * N]], 1), sizes).double()
        first, again = losses[:, N - 1 : 2 * N - 1].mean().item(), losses[:, -N:].mean().item()
        found.append({"gap": gap, "first": first, "again": again})
    return found


def decoding(model: LanguageModel, sizes: Sizes) -> dict:
    """Milliseconds per token of one stream after a long context, and its bytes; bfloat16 weights, the engine's step."""
    device = model.embedding.weight.device
    served = copy.deepcopy(model).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    steps = WARM_UP_STEPS + TIMED_STEPS + 2
    engine = Engine(served, num_slots=1, max_tokens=sizes.context + steps)
    prompt = torch.randint(model.config.vocab_size, (sizes.context,), generator=torch.Generator().manual_seed(0))
    generation = engine.submit(Request(prompt.tolist(), steps, Sampling(temperature=0), ignore_eos=True))
    begin = time.perf_counter()
    while not generation.tokens:
        engine.step()
    first = time.perf_counter() - begin
    for _ in range(WARM_UP_STEPS):
        engine.step()
    times = []
    for _ in range(TIMED_STEPS):
        begin = time.perf_counter()
        engine.step()  # waits for its token
        times.append(time.perf_counter() - begin)
    config = replace(served.config, dtype="bfloat16")
    return {
        "milliseconds_per_token": 1e3 * statistics.median(times),
        "milliseconds_to_first_token": 1e3 * first,
        "state_bytes": model_cost(config, sizes.context).state_bytes,
    }


# What a finalist is measured for beside its validation loss: name -> (model, corpus, sizes) -> plain data.
FINAL: dict[str, Callable[[LanguageModel, Corpus, Sizes], Any]] = {
    "test_loss": lambda model, corpus, sizes: mean_loss(model, corpus.test, sizes, sizes.valid_rows),
    "positions": lambda model, corpus, sizes: by_position(model, corpus.valid, sizes),
    "positions_books": lambda model, corpus, sizes: by_position(model, corpus.books, sizes),
    "books_bits_per_byte": lambda model, corpus, sizes: [
        (length, bits_per_byte(model, corpus.books, sizes, length)) for length in (sizes.length, sizes.longest)
    ],
    "recall": lambda model, corpus, sizes: recall(model, corpus.books, sizes),
    "decode": lambda model, corpus, sizes: decoding(model, sizes),
}
