"""Devices of GPU kernels: whether a tensor goes to kernels, and the current GPU, on which Triton launches them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def current_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes x's GPU the current one; does nothing where it is already, and on a CPU."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def uses_kernels(x: Tensor) -> bool:
    """Whether the decode operators run as GPU kernels for x; otherwise they are torch operators chosen for a CPU."""
    return x.is_cuda
