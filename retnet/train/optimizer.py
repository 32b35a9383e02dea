"""Parameter groups (weight decay, muP, routers with their own learning rate), and schedules: defaults and a check."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from retnet.layers.moe import ExpertLinear, MoE
from retnet.models.mup import Rates

DECAY_SHARE = 0.2  # of the steps, in the decay of `warmup_stable_decay`
_PROBES = 100  # steps at which a schedule is tried


def decayed_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters with weight decay: matrices, except those that compute decays."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, ExpertLinear)) and not name.endswith("decay_proj")
    }
    return [name for name, _ in model.named_parameters() if name in matrices]


def scale_by_width(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give AdamW the learning rates, weight decays and eps of muP, if the model has it (`retnet.models.mup`).

    Weights whose rate differs from their group's move to groups of their own, after the others. Raises ValueError for
    an optimizer that is no form of Adam.
    """
    rates = Rates(model)
    if rates.ratio == 1.0:
        return
    if not isinstance(optimizer, torch.optim.Adam) and "adam" not in type(optimizer).__name__.lower():
        raise ValueError(f"muP has no rules for {type(optimizer).__name__}; accepted: AdamW, or optim=muon")
    for group in list(optimizer.param_groups):
        if "eps" in group:
            group["eps"] /= rates.ratio
        factors = {id(p): rates.of(p, "adamw") for p in group["params"]}
        params, group["params"] = group["params"], [p for p in group["params"] if factors[id(p)] == 1.0]
        for factor in dict.fromkeys(factor for factor in factors.values() if factor != 1.0):
            scaled = {"lr": factor * group["lr"], "weight_decay": group["weight_decay"] / factor}
            moved = [p for p in params if factors[id(p)] == factor]
            optimizer.add_param_group({**group, "params": moved, **scaled})


def separate_routers(optimizer: torch.optim.Optimizer, model: nn.Module, lr_multiplier: float) -> None:
    """Move the routers of mixtures of experts to parameter groups with `lr_multiplier` times the learning rate."""
    routers = {id(module.router.weight) for module in model.modules() if isinstance(module, MoE)}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in routers]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            optimizer.add_param_group({**group, "params": moved, "lr": lr_multiplier * group["lr"]})


def complete_schedule(
    kind: str, arguments: dict[str, Any] | None, warmup_steps: int, num_steps: int
) -> dict[str, Any] | None:
    """The arguments of a schedule: `warmup_stable_decay` falls linearly to 0 in the last fifth unless they say else.

    Its num_decay_steps below 1 is a share of the run, as for warmup_steps. Raises ValueError if the run is too short.
    """
    if kind != "warmup_stable_decay":
        return arguments
    values = {"num_decay_steps": DECAY_SHARE, "decay_type": "linear"} | (arguments or {})
    decay = values["num_decay_steps"]
    if not isinstance(decay, int | float) or not 0 <= decay < math.inf or (decay > 1 and decay != int(decay)):
        raise ValueError(f"num_decay_steps is {decay!r}; accepted: a share of the run below 1, or a number of steps")
    steps = math.ceil(decay * num_steps) if decay < 1 else int(decay)
    if warmup_steps + steps > num_steps:
        raise ValueError(f"{warmup_steps} steps of warm-up and {steps} of decay are more than the run's {num_steps}")
    return values | {"num_decay_steps": steps}


def check_schedule(scheduler: LRScheduler, num_steps: int) -> None:
    """Raise the error of a schedule that would fail in a later step, and ValueError for a rate that is no rate."""
    if not isinstance(scheduler, LambdaLR):
        return
    for step in sorted({0, 1, num_steps - 1, num_steps, *(num_steps * part // _PROBES for part in range(_PROBES))}):
        factor = scheduler.lr_lambdas[0](step)
        if isinstance(factor, complex) or not 0 <= factor < math.inf:
            raise ValueError(f"at step {step} the learning rate is multiplied by {factor}")
