"""A stack's `training_hints` as fields of transformers' TrainingArguments.

Only hints that the file gives are used, so that other stacks train with the recipe's defaults. `init`, `dropout`,
`checkpointing`, `seed` and muP belong to the model and are not used here.
"""

import math
from collections.abc import Collection
from typing import Any

from .schema import MuonHints, Spec, TrainingHints

_FIELDS = {
    "lr_peak": "learning_rate",
    "weight_decay": "weight_decay",
    "grad_clip": "max_grad_norm",
}
_WHOLE_RUN = math.nextafter(1.0, 0.0)  # warmup_steps of TrainingArguments: a share of the run below 1, steps from 1 on


def training_defaults(spec: Spec, given: Collection[str] = ()) -> dict[str, Any]:
    """Values for TrainingArguments, without the fields that the user has `given`."""
    hints = spec.training_hints or TrainingHints()
    known = hints.model_fields_set
    values: dict[str, Any] = {field: getattr(hints, hint) for hint, field in _FIELDS.items() if hint in known}
    if "warmup_steps_ratio" in known:
        values["warmup_steps"] = min(hints.warmup_steps_ratio, _WHOLE_RUN)
    if "betas" in known:
        values["adam_beta1"], values["adam_beta2"] = hints.betas
    if "lr_floor_ratio" in known and "lr_scheduler_type" not in given:
        values["lr_scheduler_type"] = "cosine_with_min_lr"
        values["lr_scheduler_kwargs"] = {"min_lr_rate": hints.lr_floor_ratio}
    if _is_muon(hints) and "optim" not in given:
        values["optim"] = "muon"
        if "muon" in known:
            values["optim_args"] = _iteration(hints.muon)
    return {field: value for field, value in values.items() if field not in given}


def optimizer_groups(spec: Spec) -> dict[str, list[str]] | None:
    """Patterns of the names of parameters that Muon and AdamW train; None without any, or without Muon."""
    hints = spec.training_hints or TrainingHints()
    groups = hints.optimizer_groups
    if not _is_muon(hints) or not (groups.muon or groups.adamw):
        return None
    return {"muon": list(groups.muon), "adamw": list(groups.adamw)}


def _is_muon(hints: TrainingHints) -> bool:
    """Muon here is a hybrid: what is no matrix is trained by AdamW."""
    return hints.optimizer in ("muon", "hybrid")


def _iteration(muon: MuonHints) -> str:
    """The settings as `optim_args` of muon."""
    values = {"ns_steps": muon.ns_iters, "ns_coefs": muon.ns_coefs}
    values |= {"stabilize_steps": muon.stabilize_iters, "stabilize_coefs": muon.stabilize_coefs}
    texts = (f"{key}={':'.join(map(str, x)) if isinstance(x, list) else x}" for key, x in values.items())
    return ",".join(texts)


def router_lr_multiplier(spec: Spec) -> float:
    """The learning rate of routers, divided by that of all other parameters."""
    return (spec.training_hints or TrainingHints()).router_lr_multiplier
