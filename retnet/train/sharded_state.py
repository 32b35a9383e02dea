"""The state of a run as named tensors, of which each process saves its share, and plain values.

    weights.NAME               parameters and buffers of the model, without a tied head
    optimizer.PARAMETER.KEY    tensors that the optimizer keeps for a parameter

Names do not depend on how a run is distributed. Under FSDP2 a process has its shards. Tensors that every process has
whole, under DDP all of them, are divided among the processes by size, so each copies and writes its share of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from retnet.models.shards import WEIGHTS, Shards, dtype_name
from retnet.system.checks import quoted
from retnet.train.checkpoints import first_failure
from retnet.train.plain_state import from_plain, to_plain
from retnet.train.shard_storage import ShardReader

OPTIMIZER = "optimizer."


def weight_tensors(model: nn.Module, tied: set[str]) -> dict[str, Tensor]:
    """The model's own tensors by name; loading into them changes the model."""
    state = get_model_state_dict(model)
    return {WEIGHTS + name: x for name, x in state.items() if name not in tied and isinstance(x, Tensor)}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by name. Raises ValueError for one that a part of a file does not hold."""
    tensors = {}
    for name, p in _parameters(model, optimizer):
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[_tensor_name(name, key)] = _savable(f"the optimizer's {key} of {name}", value, p)
    return tensors


def optimizer_values(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What else the optimizer has, as JSON: the options of its groups, their parameters, and values per parameter."""
    names = {id(p): name for name, p in _parameters(model, optimizer)}
    groups = [
        {
            "parameters": [names[id(p)] for p in group["params"]],
            "options": to_plain(_options(group), "the optimizer's option"),
        }
        for group in optimizer.param_groups
    ]
    states = {
        name: {
            "tensors": sorted(key for key, value in state.items() if isinstance(value, Tensor)),
            "values": to_plain({k: v for k, v in state.items() if not isinstance(v, Tensor)}, f"state of {name}"),
        }
        for name, p in _parameters(model, optimizer)
        if (state := optimizer.state.get(p))
    }
    return {"groups": groups, "states": states}


def own_share(tensors: Mapping[str, Tensor], process: int, processes: int) -> dict[str, Tensor]:
    """What a process saves of tensors that all processes have: its shards, and whole ones of about equal bytes."""
    share, load = {}, [0] * processes
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        if not isinstance(tensors[name], DTensor):
            owner = load.index(min(load))
            load[owner] += tensors[name].nbytes
            if owner != process:
                continue
        share[name] = tensors[name]
    return share


def load_tensors(shards: Shards, targets: dict[str, Tensor]) -> None:
    """Fill tensors from shards of any number of processes. Raises ValueError for one of another shape or dtype."""
    for name, target in targets.items():
        saved = shards.tensors.get(name)
        if saved is None:
            raise ValueError(f"{shards.directory} has no {name}")
        if (saved.dtype, saved.shape) != (target.dtype, tuple(target.shape)):
            raise ValueError(
                f"{name} of {shards.directory} is {saved.dtype} {list(saved.shape)}, not {target.dtype} "
                f"{list(target.shape)}"
            )
    try:
        with warnings.catch_warnings():  # every process reads by itself, which torch takes for a run of one
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp.load(dict(targets), storage_reader=ShardReader(shards), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"{shards.directory} cannot be read: {first_failure(error)}") from error


def load_weights(shards: Shards, model: nn.Module, tied: set[str]) -> None:
    """Load the model's own tensors. Raises ValueError unless the shards hold those and no others."""
    targets = weight_tensors(model, tied)
    unknown = sorted(name for name in shards.tensors if name.startswith(WEIGHTS) and name not in targets)
    if unknown:
        raise ValueError(f"{shards.directory} has tensors that the model has not: {', '.join(unknown[:5])}")
    load_tensors(shards, targets)


def load_optimizer(shards: Shards, values: Any, model: nn.Module, optimizer: Optimizer) -> None:
    """Load what `optimizer_tensors` and `optimizer_values` gave. Raises ValueError for another optimizer's."""
    where = f"the optimizer of {shards.directory}"
    current = {"groups": [None], "states": None}
    if not isinstance(values, dict) or values.keys() != current.keys() or not isinstance(values["states"], dict):
        raise ValueError(f"{where} is {quoted(values)}; accepted: groups and states")
    groups = _groups(values["groups"], model, optimizer, where)
    states: dict[int, dict[str, Any]] = {}
    targets: dict[str, Tensor] = {}
    parameters = list(_parameters(model, optimizer))
    if unknown := values["states"].keys() - {name for name, _ in parameters}:
        raise ValueError(f"{where} has a state of {min(unknown)}, which it does not train")
    for index, (name, p) in enumerate(parameters):
        if name not in values["states"]:
            continue
        saved = values["states"][name]
        if not isinstance(saved, dict) or saved.keys() != {"tensors", "values"} or not _is_names(saved["tensors"]):
            raise ValueError(f"{where} has the state {quoted(saved)} of {name}; accepted: tensors and values")
        tensors = {key: _target(shards, _tensor_name(name, key), p) for key in saved["tensors"]}
        targets |= {_tensor_name(name, key): x for key, x in tensors.items()}
        plain = from_plain(saved["values"], dict.fromkeys(saved["values"]), f"{where}: state of {name}")
        states[index] = tensors | plain
    if others := [x for x in shards.tensors if x.startswith(OPTIMIZER) and x not in targets]:
        raise ValueError(f"{where} has the tensor {min(others)}, which no state names")
    load_tensors(shards, targets)
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _parameters(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's parameters with their names, in its order."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield names[id(p)], p


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _groups(saved: Any, model: nn.Module, optimizer: Optimizer, where: str) -> list[dict[str, Any]]:
    """Saved groups as torch's optimizers load them: options, and the numbers of the parameters."""
    names = {id(p): name for name, p in _parameters(model, optimizer)}
    if not isinstance(saved, list) or len(saved) != len(optimizer.param_groups):
        raise ValueError(f"{where} has the groups {quoted(saved)}; accepted: {len(optimizer.param_groups)} of them")
    groups: list[dict[str, Any]] = []
    first = 0
    for i, (data, group) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        own = [names[id(p)] for p in group["params"]]
        if not isinstance(data, dict) or data.keys() != {"parameters", "options"} or data["parameters"] != own:
            raise ValueError(f"group {i} of {where} is not of the {len(own)} parameters of this run's group")
        options = from_plain(data["options"], _options(group), f"an option of {where}")
        groups.append(options | {"params": list(range(first, first + len(own)))})
        first += len(own)
    return groups


def _is_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, str) and x.isidentifier() for x in values)


def _tensor_name(parameter: str, key: str) -> str:
    if not isinstance(key, str) or not key.isidentifier():
        raise ValueError(f"the optimizer keeps {quoted(key)} for {parameter}; accepted: names like exp_avg")
    return f"{OPTIMIZER}{parameter}.{key}"


def _savable(what: str, value: Tensor, p: Tensor) -> Tensor:
    if type(value) not in (Tensor, DTensor, nn.Parameter):
        raise ValueError(f"{what} is a {type(value).__name__}; accepted: plain tensors, or checkpoints=whole")
    if isinstance(p, DTensor) and value.shape != p.shape and value.ndim:
        raise ValueError(
            f"{what} has shape {list(value.shape)}, and the parameter {list(p.shape)}; accepted under FSDP: equal "
            "shapes, or checkpoints=whole"
        )
    dtype_name(what, value.dtype)
    return value


def _target(shards: Shards, name: str, p: Tensor) -> Tensor:
    """An empty tensor to load a state into: distributed as the parameter if it has its shape."""
    saved = shards.tensors.get(name)
    if saved is None:
        raise ValueError(f"{shards.directory} has no {name}")
    if saved.shape == tuple(p.shape):
        return torch.empty_like(p, dtype=saved.dtype, requires_grad=False)
    return torch.empty(saved.shape, dtype=saved.dtype)
