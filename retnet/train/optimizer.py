"""Parameter groups: which parameters have weight decay, and routers with a learning rate of their own."""

from __future__ import annotations

import torch
from torch import nn

from retnet.layers.moe import ExpertLinear, MoE


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
