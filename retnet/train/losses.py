"""Detection of losses that are not finite, with the step where they began and the documents it was trained on.

Losses stay on the device until they are checked, because a check waits for the device. They are checked after every
step on a CPU, after every `CHECK_EVERY` steps on a GPU, and before every checkpoint, so that no checkpoint holds the
weights of a failed run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

CHECK_EVERY = 10  # steps, on a GPU
_SHOWN = 12


class NonFiniteLoss(ValueError):
    """A run that cannot continue. documents: what the step was trained on."""

    def __init__(self, message: str, documents: list[str]):
        super().__init__(message)
        self.documents = documents


@dataclass(frozen=True)
class _MicroBatch:
    step: int
    rows: tuple[int, ...]
    loss: Tensor


class LossWatch:
    """The losses of the micro-batches since the last check.

    describe: the documents of a row, by the row's number. documents: those of the loss that a check found.
    """

    def __init__(self, describe: Callable[[int], list[str]]):
        self._describe = describe
        self._unchecked: list[_MicroBatch] = []
        self.documents: list[str] = []

    def add(self, step: int, rows: tuple[int, ...], loss: Tensor) -> None:
        """Keep the loss of one micro-batch until the next check."""
        self._unchecked.append(_MicroBatch(step, rows, loss))

    def check(self) -> str | None:
        """A description of the first loss that is not finite, or None. The checked losses are forgotten."""
        batches, self._unchecked = self._unchecked, []
        if not batches:
            return None
        values = torch.stack([batch.loss.float() for batch in batches]).tolist()
        for batch, value in zip(batches, values, strict=True):
            if not abs(value) < float("inf"):  # also true of NaN
                self.documents = [text for row in batch.rows for text in self._describe(row)]
                return f"loss is {value} at step {batch.step}, trained on {_listed(self.documents)}"
        return None


def _listed(documents: list[str]) -> str:
    more = f"; and {len(documents) - _SHOWN} more" if len(documents) > _SHOWN else ""
    return "; ".join(documents[:_SHOWN]) + more


@torch.no_grad()
def all_finite(module: torch.nn.Module) -> bool:
    """Whether every weight that this process holds is finite."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return bool(torch.stack([p.isfinite().all() for p in local]).all())
