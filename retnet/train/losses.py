"""Losses that are not finite: found at the step where they began, with the documents that were trained on.

Losses stay on the device until somebody looks, which waits for it: at every step on a CPU, else every few, and always
before a checkpoint is written, so that none is written after things went wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

LOOK_EVERY = 10  # steps, on a GPU
_SHOWN = 12


class NonFiniteLoss(ValueError):
    """A run cannot go on. documents: what the step was trained on."""

    def __init__(self, message: str, documents: list[str]):
        super().__init__(message)
        self.documents = documents


@dataclass(frozen=True)
class _Kept:
    step: int
    rows: tuple[int, ...]
    loss: Tensor


class LossWatch:
    """Losses of the micro-batches since somebody last looked.

    describe: the documents of a row by its number.
    """

    def __init__(self, describe: Callable[[int], list[str]]):
        self._describe = describe
        self._kept: list[_Kept] = []

    def add(self, step: int, rows: tuple[int, ...], loss: Tensor) -> None:
        """The loss of one micro-batch of the step."""
        self._kept.append(_Kept(step, rows, loss))

    def look(self) -> str | None:
        """What is wrong, if anything is; all losses so far are forgotten."""
        kept, self._kept = self._kept, []
        if not kept:
            return None
        values = torch.stack([k.loss.float() for k in kept]).tolist()
        for entry, value in zip(kept, values, strict=True):
            if not abs(value) < float("inf"):  # false for NaN too
                self.documents = [text for row in entry.rows for text in self._describe(row)]
                return f"loss is {value} at step {entry.step}, trained on {_listed(self.documents)}"
        return None


def _listed(documents: list[str]) -> str:
    more = f"; and {len(documents) - _SHOWN} more" if len(documents) > _SHOWN else ""
    return "; ".join(documents[:_SHOWN]) + more


@torch.no_grad()
def all_finite(module: torch.nn.Module) -> bool:
    """Whether every weight that this process holds is a number."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return bool(torch.stack([p.isfinite().all() for p in local]).all())
