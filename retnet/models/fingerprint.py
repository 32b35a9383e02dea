"""Fingerprint of a model: a hash of its configuration and weights that snapshots carry."""

import ctypes
import hashlib
import json

import torch
from torch import Tensor

from retnet.models.decode.int8 import int8_parts
from retnet.models.lm import LanguageModel

SAMPLED_VALUES = 1024  # per weight tensor
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def fingerprint(model: LanguageModel) -> str:
    """A hash of the configuration and, for each weight, its name, shape, dtype, sum, and evenly spaced values.

    The sum over all bits, read as integers, changes with any single value. Hashing all of 13 GB would take longer than
    the prompts that snapshots save.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("name", "source", "seed", "dtype")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
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
        total = int(flat.view(_INTEGERS[weight.element_size()]).sum(dtype=torch.int64))
        digest.update(f"{name} {list(weight.shape)} {weight.dtype} {total}".encode())
        digest.update(bytes_of(values))
    return digest.hexdigest()


def bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without numpy."""
    size = x.numel() * x.element_size()
    return memoryview((ctypes.c_char * size).from_address(x.data_ptr())) if size else memoryview(b"")
