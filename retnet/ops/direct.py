"""Eager calls on a GPU that need no dispatcher, because nothing but the kernel would see them.

torch's dispatcher brings an operator to tracers, transforms and modes. Where the operator is written in Python it takes
tens of microseconds, once for autograd and once for the device: as long as a launch.
"""

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor

from retnet.ops.derivatives import transforms_active

_PLAIN = (Tensor, nn.Parameter)


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors on a GPU, and nobody looks at the operators that are called with them.

    Those who look: torch.compile and export, transforms of torch.func and forward mode, tracers, modes (dispatch modes
    and function modes), torch's profiler. A subclass of Tensor and a batched tensor look for themselves.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x is not None and not (type(x) in _PLAIN and x.is_cuda and not is_legacy_batchedtensor(x)):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )
