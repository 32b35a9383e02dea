"""Parameter groups (weight decay, routers with a learning rate of their own), and a check of schedules."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from retnet.layers.moe import ExpertLinear, MoE

_PROBES = 100  # steps at which a schedule is tried


def decayed_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters with weight decay: matrices, except those that compute decays."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, ExpertLinear)) and not name.endswith("decay_proj")
    }
    return [name for name, _ in model.named_parameters() if name in matrices]


def separate_routers(optimizer: torch.optim.Optimizer, model: nn.Module, lr_multiplier: float) -> None:
    """Move the routers of mixtures of experts to parameter groups with `lr_multiplier` times the learning rate."""
    routers = {id(module.router.weight) for module in model.modules() if isinstance(module, MoE)}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in routers]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            optimizer.add_param_group({**group, "params": moved, "lr": lr_multiplier * group["lr"]})


def check_schedule(scheduler: LRScheduler, num_steps: int) -> None:
    """Raise the error of a schedule that would fail in a later step, and ValueError for a rate that is no rate."""
    if not isinstance(scheduler, LambdaLR):
        return
    for step in sorted({0, 1, num_steps - 1, num_steps, *(num_steps * part // _PROBES for part in range(_PROBES))}):
        factor = scheduler.lr_lambdas[0](step)
        if isinstance(factor, complex) or not 0 <= factor < math.inf:
            raise ValueError(f"at step {step} the learning rate is multiplied by {factor}")
