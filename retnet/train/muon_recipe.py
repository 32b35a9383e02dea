"""`optim=muon` of a recipe: its `optim_args`, and the factory that makes the optimizer for the Trainer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainingArguments

from retnet.models.mup import Rates
from retnet.system.suggest import choices, nearest
from retnet.train.muon import COEFFICIENTS, STABILIZING, Coefficients, Muon, check_iteration, muon_groups
from retnet.train.parameter_patterns import Patterns

MUON = "muon"  # value of `optim`
NS_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class MuonArgs:
    """The keys of `optim_args`.

    adamw_lr_multiplier: the rate of AdamW's parameters, relative to Muon's. ns_dtype: of the Newton-Schulz iteration;
    "auto" is bfloat16 on a GPU and float32 on a CPU. Coefficients are written as 2.0:-1.5:0.5.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: str = "auto"
    adamw_lr_multiplier: float = 1.0
    ns_coefs: tuple[float, ...] = COEFFICIENTS
    stabilize_steps: int = 0
    stabilize_coefs: tuple[float, ...] = STABILIZING

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; accepted: 0 or more, and below 1")
        check_iteration(
            self.ns_steps, self.stabilize_steps, ns_coefs=self.ns_coefs, stabilize_coefs=self.stabilize_coefs
        )
        if self.ns_dtype not in NS_DTYPES:
            raise ValueError(f"ns_dtype is {self.ns_dtype!r}; {choices(self.ns_dtype, NS_DTYPES)}")
        if not 0 <= self.adamw_lr_multiplier < math.inf:
            raise ValueError(f"adamw_lr_multiplier is {self.adamw_lr_multiplier}; accepted: 0 or more")

    @classmethod
    def parse(cls, text: str | None) -> MuonArgs:
        """From "momentum=0.9, ns_steps=6"; ValueError names what is not accepted."""
        values: dict[str, Any] = {}
        known = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        for setting in (text or "").replace(" ", "").split(",") if text else ():
            key, equals, value = setting.partition("=")
            if key not in known:
                near = nearest(key, known)
                hint = f"did you mean {near!r}?" if near else f"accepted: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r} in optim_args of muon, {hint}")
            if key in values:
                raise ValueError(f"{key} is given twice in optim_args; accepted: once")
            values[key] = _value(known[key], key, value if equals else "")
        return cls(**values)


def _value(kind: type, key: str, text: str) -> Any:
    if kind is str:
        return text
    try:
        if kind is tuple:
            return tuple(map(float, text.split(":")))
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        accepted = {bool: "true or false", int: "an integer", float: "a number", tuple: "numbers"}[kind]
        raise ValueError(f"{key} is {text!r} in optim_args of muon; accepted: {accepted}") from error


class MuonFactory:
    """An optimizer factory of transformers: called with the model and the second value of `muon_cls_and_kwargs`."""

    def __call__(
        self,
        model: nn.Module,
        settings: MuonArgs,
        lr: float,
        weight_decay: float,
        patterns: Patterns | None = None,
        eps: float = 1e-8,
        **options: Any,
    ) -> Muon:
        groups = muon_groups(model, lr, weight_decay, settings.adamw_lr_multiplier, patterns)
        return Muon(
            groups,
            lr=lr,
            weight_decay=weight_decay,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            ns_steps=settings.ns_steps,
            ns_dtype=NS_DTYPES[settings.ns_dtype],
            ns_coefs=cast(Coefficients, settings.ns_coefs),
            stabilize_steps=settings.stabilize_steps,
            stabilize_coefs=cast(Coefficients, settings.stabilize_coefs),
            eps=eps / Rates(model).ratio,
            **options,
        )


def muon_cls_and_kwargs(
    args: TrainingArguments, patterns: Patterns | None = None
) -> tuple[type[MuonFactory], dict[str, Any]] | None:
    """The Trainer's `optimizer_cls_and_kwargs`; None for another optimizer. Raises ValueError as `MuonArgs.parse`."""
    if args.optim != MUON:
        return None
    return MuonFactory, {
        "settings": MuonArgs.parse(args.optim_args),
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "patterns": patterns,
        "process_group": dist.group.WORLD if args.world_size > 1 else None,
    }
