"""The GPU that kernels are launched on: Triton takes the current one, whatever device its tensors are on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def current_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes x's GPU the current one; does nothing where it is already, and on a CPU."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
