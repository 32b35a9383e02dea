"""Parts of the training loss beside the cross-entropy: the losses of routers and of multi-token prediction.

They are summed from log to log, as the Trainer sums its loss, and logged under names of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retnet.layers.moe import MoE
from retnet.train.packed_model import PackedForCausalLM

NAMES = {"router_loss": "aux_loss", "mtp_loss": "mtp_loss"}  # in the log: of the model's output


class LossParts:
    """The sums of one process since step `logged`, for the parts that the model's training loss has."""

    def __init__(self, model: PackedForCausalLM, device: torch.device):
        has_routers = any(isinstance(module, MoE) for module in model.modules())
        there = {"router_loss": has_routers, "mtp_loss": model.model.mtp is not None}
        names = [name for name in NAMES if there[name] and model.trains_weights]
        self._sums = {name: torch.tensor(0.0, device=device) for name in names}
        self._last: dict[str, Tensor] = {}
        self.logged = 0

    def note(self, outputs: Any, scale: float) -> None:
        """The parts of a micro-batch's loss, as the Trainer scales that loss."""
        parts = {name: getattr(outputs, theirs) for name, theirs in NAMES.items()}
        self._last = {name: part.detach() * scale for name, part in parts.items() if part is not None}

    def split_off(self, loss: Tensor) -> Tensor:
        """Add the parts of the last micro-batch to the sums: the loss without them."""
        for name, part in self._last.items():
            self._sums[name] += part
            loss = loss - part
        return loss

    def means(self, step: int, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all steps since the last log and over all processes; the sums begin anew."""
        means = {name: gather(total).mean().item() / (step - self.logged) for name, total in self._sums.items()}
        self.restore({}, step)
        return means

    def sums(self) -> dict[str, float]:
        """What `restore` takes."""
        return {name: float(total) for name, total in self._sums.items()}

    def restore(self, sums: dict[str, float], logged: int) -> None:
        for name, total in self._sums.items():
            total.fill_(sums.get(name, 0.0))
        self.logged = logged
