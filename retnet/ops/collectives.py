"""Collectives of torch.distributed under names that all supported versions of torch have."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

Function = TypeVar("Function", bound=Callable[..., Any])

# torch 2.13 deprecates the names that torch 2.11 has.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def outside_graphs(function: Function) -> Function:
    """The function, which torch.compile calls as it is: its graphs do not wait for other processes."""
    return cast(Function, torch.compiler.disable(function))
