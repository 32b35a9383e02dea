"""What a stack's `training_hints` ask of training, as fields of transformers' TrainingArguments.

Only hints that the file gives count, so that a stack without them trains by the recipe's own defaults. `init`,
`dropout`, `checkpointing` and `seed` are not here: they are the model's.
"""

import math
from collections.abc import Collection
from typing import Any

from .schema import Spec, TrainingHints

_FIELDS = {
    "lr_peak": "learning_rate",
    "weight_decay": "weight_decay",
    "grad_clip": "max_grad_norm",
}
_WHOLE_RUN = math.nextafter(1.0, 0.0)  # TrainingArguments' warmup_steps: below 1 a share of the run, 1.0 a step


def training_defaults(spec: Spec, given: Collection[str] = ()) -> dict[str, Any]:
    """Fields and values for TrainingArguments; those that the user has `given` are left out.

    Raises ValueError for an optimizer that they do not have, unless the user chose another.
    """
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
    if hints.optimizer != "adamw" and "optim" not in given:
        raise ValueError(
            f"training_hints.optimizer is {hints.optimizer}; `retnet train` accepts adamw there (optim=... overrides)"
        )
    return {field: value for field, value in values.items() if field not in given}


def router_lr_multiplier(spec: Spec) -> float:
    """The learning rate of routers over that of everything else."""
    return (spec.training_hints or TrainingHints()).router_lr_multiplier
