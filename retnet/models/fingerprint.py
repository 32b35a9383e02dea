"""Fingerprint of a model: a hash of its configuration, weights and adapters that snapshots carry."""

import ctypes
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from retnet.models.decode.int8 import int8_parts
from retnet.models.lm import LanguageModel

SAMPLED_VALUES = 1024  # per weight tensor
_PLAIN_PACKAGES = ("torch.nn.modules.", "retnet.")  # their modules' settings are those of the configuration
_WITHOUT_EFFECT = ("name", "source", "seed", "dtype", "mup_base_width")  # on what the weights compute
_SETTING = (bool, float, str)
INTEGERS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def fingerprint(model: LanguageModel) -> str:
    """A hash of the configuration, the settings of adapters and, for each weight, its name, shape, dtype, sum, and
    evenly spaced values.

    Each process of a split model has a fingerprint of its own, because its states are those of its own heads.
    The sum over all bits, read as integers, changes with any single value. Hashing all of 13 GB would take longer than
    the prompts that snapshots save.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _WITHOUT_EFFECT}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    if model.shard is not None:
        digest.update(str(model.shard).encode())
    if adapters := settings(model):
        digest.update(json.dumps(adapters, sort_keys=True).encode())
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        int8 = int8_parts(weight)
        weights |= {name: weight} if int8 is None else {f"{name}.int8": int8[0], f"{name}.scale": int8[1]}
    for name, weight in sorted(weights.items()):
        flat = weight.detach().flatten()
        places = torch.linspace(
            0, max(0, flat.numel() - 1), min(SAMPLED_VALUES, flat.numel()), dtype=torch.float64, device="cpu"
        )
        values = flat[places.round().long().to(flat.device)].cpu().contiguous()
        total = int(flat.view(INTEGERS_OF_SIZE[weight.element_size()]).sum(dtype=torch.int64))
        digest.update(f"{name} {list(weight.shape)} {weight.dtype} {total}".encode())
        digest.update(bytes_of(values))
    return digest.hexdigest()


def settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The settings of adapters, parametrizations and other foreign modules, by module and attribute: which adapters are
    active, their scales, and the like. Integers are left out, because they may count calls."""
    found = {}
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(_PLAIN_PACKAGES):
            own = {key: _copied_setting(value) for key, value in vars(module).items() if key != "training"}
            found[name] = {key: value for key, value in own.items() if value is not None}
    return found


def _copied_setting(value: object) -> Any:
    """A copy of a flag, number, text, or a list or dict of them; None for other values."""
    if type(value) in _SETTING:
        return value
    if isinstance(value, (list, tuple)) and all(type(item) in _SETTING for item in value):
        return list(value)
    if isinstance(value, dict) and all(type(key) is str and type(item) in _SETTING for key, item in value.items()):
        return dict(value)
    return None


def bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without numpy."""
    size = x.numel() * x.element_size()
    return memoryview((ctypes.c_char * size).from_address(x.data_ptr())) if size else memoryview(b"")
