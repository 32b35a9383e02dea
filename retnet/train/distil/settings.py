"""Settings of a distillation: those of `retnet train`, for both stages or for one of them.

learning_rate=1e-3              of both stages
layers.learning_rate=2e-3       of the stage that aligns layers
logits.optim=muon               of the stage that trains on the teacher's logits
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retnet.system.suggest import choices
from retnet.train.recipe import Recipe, load_recipe

LAYERS, LOGITS = "layers", "logits"
STAGES = (LAYERS, LOGITS)
# One pass over the training documents in all. The rows of the second stage come in another order than the first's.
STARTS: dict[str, dict[str, Any]] = {
    LAYERS: {"num_train_epochs": 0.25, "learning_rate": 2e-3, "weight_decay": 0.0, "num_samples": 0, "data_seed": 1},
    LOGITS: {"num_train_epochs": 0.75, "learning_rate": 1e-3, "weight_decay": 0.0},
}
# Settings that the distillation makes itself, or that its stages do not support.
_OWN = ("model", "output_dir", "resume_from_checkpoint", "force")
_UNSUPPORTED = ("carry_state", "context_parallel", "deepspeed", "fsdp", "fsdp_config", "method")


def stage_recipe(
    stage: str, words: Iterable[str], *, data: str | None, model: Path, output: Path, resume: bool = False
) -> Recipe:
    """The recipe of a stage. resume: from its newest checkpoint, if there is one.

    Raises ValueError as `load_recipe` does, for a stage that does not exist, and for settings that are not the user's.
    """
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        prefix, dot, name = key.rpartition(".")
        if not equals or not name:
            raise ValueError(f"{word!r} is given as a setting; accepted: key=value")
        if dot and prefix not in STAGES:
            raise ValueError(f"{word!r} is of the stage {prefix!r}; {choices(prefix, STAGES)}")
        if name in _OWN:
            raise ValueError(f"{name} is chosen by the distillation; accepted: its arguments and --resume")
        if name in _UNSUPPORTED:
            raise ValueError(f"{name} is not supported in distillation; accepted: settings without it")
        if dot and prefix != stage:
            continue
        into = own if dot else common
        if name in into:
            raise ValueError(f"{key} is given twice, as {into[name]!r} and {text!r}; accepted: once")
        into[name] = text
    values = common | own
    steps = {"max_steps": "num_train_epochs", "num_train_epochs": "max_steps"}
    starts = {key: value for key, value in STARTS[stage].items() if steps.get(key) not in values}
    settings = {key: str(value) for key, value in starts.items()} | values
    return load_recipe(
        None,
        [f"{key}={value}" for key, value in settings.items()],
        data=data,
        model=str(model),
        output_dir=str(output),
        resume_from_checkpoint="auto" if resume else None,
    )
