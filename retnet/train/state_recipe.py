"""Settings of recipes with `method=state`: their defaults, and what they exclude."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from retnet.stack.resolve import saved_directory
from retnet.train.muon_recipe import MUON

Method = Literal["weights", "state"]
WEIGHTS, STATE = "weights", "state"

# A state is a sum over tokens, so its values are larger than weights are; nothing pulls it to zero.
STATE_DEFAULTS: dict[str, Any] = {"learning_rate": 0.03, "weight_decay": 0.0}
_SHARDED = ("sharded", "async")


def excluded(values: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    """The faults of a recipe with method=state. values: as given; training: with the defaults filled in."""

    def fault(key: str, value: Any, accepted: str) -> str:
        return f"{key} is {value!r} with method 'state'; accepted: {accepted}"

    model = str(values.get("model", ""))
    if model and saved_directory(model) is None:
        yield fault("model", model, "a saved directory, whose weights are trained")
    if str(values.get("carry_state", False)).lower() not in ("false", "no", "0"):
        yield fault("carry_state", values["carry_state"], "false, as every document starts from the learned state")
    if str(values.get("context_parallel", 1)) != "1":
        yield fault("context_parallel", values["context_parallel"], "1, as shards of rows take no state")
    if values.get("checkpoints") in _SHARDED:
        yield fault("checkpoints", values["checkpoints"], "whole, as a state is small")
    if values.get("float8") is not None:
        yield fault("float8", values["float8"], "none, as the weights are not trained")
    for key in ("fsdp", "deepspeed", "push_to_hub"):
        if training.get(key):
            yield fault(key, training[key], "none (torchrun alone averages the gradients of several processes)")
    if training.get("optim") == MUON:
        yield fault("optim", MUON, "an optimizer that is not only for matrices of weights, such as adamw_torch")
    if str(values.get("router_lr_multiplier", 1)) not in ("1", "1.0"):
        yield fault("router_lr_multiplier", values["router_lr_multiplier"], "1, as routers are not trained")
