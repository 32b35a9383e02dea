"""The state of a run that is not in tensors, as plain JSON: options of the optimizer, schedule, random numbers.

Values keep their bits: Python writes the shortest decimal that reads back as the same float, and numbers that are not
finite are written by name. What is read is compared with the state that it replaces: other keys or kinds of values are
refused, and nothing but plain values is made of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from retnet.system.checks import is_integer, quoted

_NAMED = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_FLOAT = "float"
_WORDS = 624  # of a Mersenne twister


def to_plain(value: Any, where: str) -> Any:
    """A value as JSON. Raises ValueError, which says where, for one that JSON does not hold."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) and value.keys() != {_FLOAT}:
        return {key: to_plain(item, f"{where}.{key}") for key, item in value.items()}
    raise ValueError(f"{where} is a {type(value).__name__}; accepted: numbers, text, lists and mappings of them")


def from_plain(data: Any, current: Any, where: str) -> Any:
    """What `to_plain` wrote, to replace a value of the same kind. Raises ValueError, which says where, for another.

    None may stand for any value and be replaced by any number or text. Lists may have another length. An empty mapping
    is None: schedulers write either for a schedule without a state.
    """
    if data in (None, {}) and current in (None, {}):
        return current
    if isinstance(data, dict) and data.keys() == {_FLOAT} and data[_FLOAT] in _NAMED:
        data = _NAMED[data[_FLOAT]]
    if isinstance(current, Mapping):
        if not isinstance(data, dict) or data.keys() != current.keys():
            raise ValueError(f"{where} is {quoted(data)}; accepted: a mapping of {', '.join(current) or 'nothing'}")
        return {key: from_plain(data[key], current[key], f"{where}.{key}") for key in current}
    if isinstance(current, list | tuple):
        if not isinstance(data, list):
            raise ValueError(f"{where} is {quoted(data)}; accepted: a list")
        like = [*current, *[current[-1] if current else None] * len(data)]
        items = [from_plain(item, like[i], f"{where}[{i}]") for i, item in enumerate(data)]
        return tuple(items) if isinstance(current, tuple) else items
    kinds = (bool, str, float | int)
    kind = next((kind for kind in kinds if isinstance(current, kind)), None)
    if isinstance(data, dict | list) or (data is not None and kind is not None and not _is(data, kind)):
        raise ValueError(f"{where} is {quoted(data)}; accepted: a value like {quoted(current)}")
    return float(data) if isinstance(current, float) and isinstance(data, int) else data


def _is(data: Any, kind: Any) -> bool:
    return isinstance(data, kind) and (kind is bool or not isinstance(data, bool))


def random_numbers(device: torch.device) -> dict[str, Any]:
    """The states of the generators of Python, numpy and torch, and of the GPU of this process."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states = {
        "python": to_plain(random.getstate(), "python"),
        "numpy": [name, keys.tolist(), *rest],
        "cpu": _hex(torch.random.get_rng_state()),
    }
    return states | ({"cuda": _hex(torch.cuda.get_rng_state(device))} if device.type == "cuda" else {})


def restore_random_numbers(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `random_numbers`. Raises ValueError for anything else.

    A generator of a GPU is left as it is if the states are of a run on a CPU.
    """
    try:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = states["numpy"]
        if len(keys) != _WORDS or not is_integer(position, 0, _WORDS):  # numpy checks neither, and would read beyond
            raise ValueError(f"position {quoted(position)} in {len(keys)} words of numpy; accepted: 0 to {_WORDS}")
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.random.set_rng_state(_bytes(states["cpu"]))
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(_bytes(states["cuda"]), device)
    except (LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"no states of random numbers: {error!r}") from error


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
