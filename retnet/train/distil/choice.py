"""The attention layers that a student keeps, chosen by measured loss.

Greedy: beginning with retention in every layer, aligned to the teacher, attention returns to the layer where it lowers
the loss most, again and again. The loss is KL(teacher || student) on rows of the training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from retnet.layers.block import Block
from retnet.models.lm import LanguageModel
from retnet.train.distil.objectives import logits_loss
from retnet.train.distil.samples import Sample


@dataclass(frozen=True)
class Choice:
    """kept: layers in the order in which attention returned to them. losses: KL before, and after each of them."""

    kept: tuple[int, ...]
    losses: tuple[float, ...]


@torch.no_grad()
def divergence(student: LanguageModel, teacher: LanguageModel, samples: Sequence[Sample]) -> float:
    """Mean KL(teacher || student) over the targets of the samples, in nats."""
    total, count = 0.0, 0
    for ids, targets, bounds in samples:
        number = int((targets != -100).sum())
        total += number * float(logits_loss(student, teacher, ids, targets[None], bounds))
        count += number
    return total / max(1, count)


def choose_attention(
    student: LanguageModel,
    teacher: LanguageModel,
    layers: Sequence[int],
    count: int,
    samples: Sequence[Sample],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """The `count` of `layers` that keep the teacher's attention. tell: gets the measurements done, and all.

    Raises ValueError for a count outside 1 to the number of layers.
    """
    if not 1 <= count <= len(layers):
        raise ValueError(f"{count} attention layers of {len(layers)}; accepted: 1 to {len(layers)}")
    kept: list[int] = []
    losses, done, total = [divergence(student, teacher, samples)], 0, sum(len(layers) - i for i in range(count))
    while len(kept) < count:
        measured: dict[int, float] = {}
        for i in layers:
            if i not in kept:
                with with_attention(student, teacher, [*kept, i]):
                    measured[i] = divergence(student, teacher, samples)
                done += 1
                tell(done, total)
        best = min(measured, key=lambda i: (measured[i], i))
        kept.append(best)
        losses.append(measured[best])
    return Choice(tuple(kept), tuple(losses))


@contextmanager
def with_attention(student: LanguageModel, teacher: LanguageModel, layers: Sequence[int]) -> Iterator[None]:
    """A context in which these layers of the student have the teacher's mixers."""
    own = {i: cast(Block, student.layers[i]).mixer for i in layers}
    try:
        for i in layers:
            cast(Block, student.layers[i]).mixer = cast(Block, teacher.layers[i]).mixer
        yield
    finally:
        for i, mixer in own.items():
            cast(Block, student.layers[i]).mixer = mixer
