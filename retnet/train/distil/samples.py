"""Rows of a run's data for measurements outside training: packed documents on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from retnet.data import Rows
from retnet.models.lm import LanguageModel
from retnet.train.batches import RowStream, collate

SAMPLE_TOKENS = 1024  # per sample where rows are shorter: models cost as much for a few tokens as for many

Sample = tuple[Tensor, Tensor, Tensor]  # ids [1, T], targets [T], bounds [N + 1] of documents laid end to end


def spread(rows: Rows, tokens: int, device: torch.device) -> list[Sample]:
    """Rows of about so many tokens in all, at least one, spread evenly over an epoch; short ones share a sample."""
    count = min(len(rows), max(1, tokens // rows.length))
    chosen = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long().tolist()
    return list(_samples(rows, chosen, max(1, SAMPLE_TOKENS // rows.length), device))


def every(rows: Rows, per_sample: int, device: torch.device) -> Iterator[Sample]:
    """All rows of an epoch in order, several per sample."""
    return _samples(rows, range(len(rows)), per_sample, device)


def _samples(rows: Rows, chosen: range | list[int], per_sample: int, device: torch.device) -> Iterator[Sample]:
    stream = RowStream(rows)
    for begin in range(0, len(chosen), per_sample):
        batch = collate([stream[number] for number in chosen[begin : begin + per_sample]])
        ids, targets, bounds = (batch[name].to(device) for name in ("input_ids", "shift_labels", "cu_seq_lens_q"))
        yield ids.reshape(1, -1), targets.flatten(), bounds


@torch.no_grad()
def mean_nats(model: LanguageModel, samples: Iterator[Sample]) -> float:
    """Cross-entropy per target of all samples, in nats."""
    total, count = 0.0, 0
    for ids, targets, bounds in samples:
        hidden, _ = model.hidden(ids, cu_seqlens=bounds)
        number = int((targets != -100).sum())
        total += number * float(model.mean_nats(hidden[0], targets))
        count += number
    return total / max(1, count)
