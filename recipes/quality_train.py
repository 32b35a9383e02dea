"""Training of one arm of `quality.py`: a stack, an optimizer, a peak learning rate and a seed, on fixed rows.

The precision and the compilation are those of `retnet train` with `bf16: true` and `torch_compile: true`: float32
weights under bfloat16 autocast, blocks compiled one by one. Nothing in a step waits for the device. The clock counts
training alone: it stops while the model is validated, and compilation comes before it.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from mixers_train import precision
from torch import Tensor, nn

from retnet import LanguageModel, ModelConfig
from retnet.train.muon import Muon, muon_groups
from retnet.train.optimizer import decayed_parameters

BETAS, MOMENTUM, WEIGHT_DECAY, CLIP, WARM_UP = (0.9, 0.95), 0.95, 0.1, 1.0, 0.05
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Arm:
    """One training run. Its name is `stack:optimizer:rate:seed[:steps]`."""

    stack: str
    optimizer: str
    rate: float
    seed: int
    steps: int

    @classmethod
    def parse(cls, name: str, steps: int) -> "Arm":
        """The arm of a name, of `steps` steps unless the name says otherwise. Raises ValueError for any other text."""
        parts = name.split(":")
        try:
            if len(parts) not in (4, 5) or parts[1] not in OPTIMIZERS:
                raise ValueError
            arm = cls(parts[0], parts[1], float(parts[2]), int(parts[3]), int(parts[4]) if len(parts) == 5 else steps)
        except ValueError:
            accepted = f"stack:optimizer:rate:seed[:steps], optimizer one of {', '.join(OPTIMIZERS)}"
            raise ValueError(f"arm is {name!r}; accepted: {accepted}") from None
        if not 0 < arm.rate < math.inf or arm.steps < 1:
            raise ValueError(f"arm is {name!r}; accepted: a positive rate and number of steps")
        return arm

    @property
    def name(self) -> str:
        return f"{self.stack}:{self.optimizer}:{self.rate:g}:{self.seed}:{self.steps}"


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then linear to 0 at the end."""
    first = max(1, round(WARM_UP * steps))
    if step < first:
        return peak * (step + 1) / first
    return peak * (steps - step) / max(1, steps - first)


def optimizer_of(model: LanguageModel, kind: str) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon as in `retnet train`; matrices have weight decay, as there."""
    if kind == "muon":
        return Muon(muon_groups(model, lr=0.0, weight_decay=WEIGHT_DECAY), momentum=MOMENTUM, betas=BETAS)
    decayed = set(decayed_parameters(model))
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


class Blocks:
    """Compiles the blocks of models in turn. A model of the same layers as the one before it reuses its code."""

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self._layers: tuple | None = None

    def compile(self, model: LanguageModel) -> None:
        if not self.wanted:
            return
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        if model.config.layers != self._layers:
            torch._dynamo.reset()
            self._layers = model.config.layers
        for layer in model.layers:
            layer.compile(dynamic=False)


# (model, steps done, seconds of training, mean training loss since the last report) -> whether to go on
Report = Callable[[LanguageModel, int, float, float], bool]


def train(
    arm: Arm, config: ModelConfig, batches: Iterator[Tensor], blocks: Blocks, device: torch.device, every: int,
    report: Report,
) -> LanguageModel:  # fmt: skip
    """The trained model. `report` is called every `every` steps and after the last one, and may end the training."""
    with device:
        model = LanguageModel(config)
    model.train()
    blocks.compile(model)
    optimizer = optimizer_of(model, arm.optimizer)
    first = next(batches)
    batches = chain([first], batches)
    _backward(model, first)  # compiles; its gradients are not used
    model.zero_grad(set_to_none=True)
    begin, spent, losses = _now(device), 0.0, []
    for step in range(arm.steps):
        rate = learning_rate(step, arm.steps, arm.rate)
        loss = _backward(model, next(batches))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss)
        done = step + 1
        if done % every == 0 or done == arm.steps:
            mean = torch.stack(losses).mean().item()
            spent += _now(device) - begin
            losses.clear()
            if not report(model, done, spent, mean):
                break
            begin = _now(device)
    return model


def _backward(model: LanguageModel, ids: Tensor) -> Tensor:
    with precision(ids.device):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.detach()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
