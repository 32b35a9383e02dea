"""Launches that overlap: a kernel may start, and ask for what no other kernel writes, while the one before still runs.

Hopper and later GPUs call it programmatic dependent launch. Between the launches of a decode step lie microseconds in
which nothing is read; with it the weights of the next product travel meanwhile. A kernel launched with
`dependent_launch` calls `await_previous` in every program, before it reads what another kernel wrote and before it
writes anything, so that all kernels before it have ended; `start_next` lets the one after it begin. Elsewhere these are
ordinary launches.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that has a constexpr DEPENDENT."""
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
