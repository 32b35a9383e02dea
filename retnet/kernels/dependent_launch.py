"""Programmatic dependent launch: a kernel prefetches while its predecessor finishes.

Hopper and later GPUs support it. Between the kernels of a decode step there are microseconds in which nothing is read;
with a dependent launch the next product's weights are loaded in that time. A kernel launched with `dependent_launch`
calls `await_previous` in every program before it reads what another kernel wrote and before it writes anything: it
returns when all earlier kernels have ended. `start_next` lets the next kernel begin. On other devices these are
ordinary launches.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """The launch options of a kernel with a constexpr DEPENDENT."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


@triton.jit
def start_next(DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def await_previous(DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_wait()
