"""`UpdateRoutingBiases`: a callback of transformers' Trainer that balances mixtures of experts by their biases.

    trainer = SFTTrainer(model, ..., callbacks=[UpdateRoutingBiases()])

`retnet train` has it. Without it, or a call of `update_routing_biases` after each step, biases stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retnet.layers.routing_bias import update_routing_biases


class UpdateRoutingBiases(TrainerCallback):
    """Updates the biases after each step of the optimizer, with the loads of all processes.

    peak: the load of the busiest expert divided by the mean load of its layer, in the last step; None without biases.
    """

    peak: Tensor | None = None

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        processes = dist.group.WORLD if args.world_size > 1 else None
        self.peak = None if model is None else update_routing_biases(model, processes)
