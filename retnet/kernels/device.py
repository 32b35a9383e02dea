"""Properties of a GPU by which kernels are chosen."""

from functools import cache

import torch


@cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def precision(dtype: torch.dtype) -> str:
    """The precision in which tl.dot multiplies float32 operands in a kernel whose inputs have this dtype.

    Float32 inputs take three tf32 products: as accurate as exact ones (relative error 2.6e-7 against 3.2e-7) and 1.7
    times as fast. Float16 inputs meet float32 states in one tf32 product, since tf32 holds every bit of float16.
    """
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of border states in memory, for inputs of this dtype."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def power_of_two(n: int) -> int:
    """The block length that holds n: a power of two, and at least 16, which tensor cores need."""
    return max(16, 1 << (n - 1).bit_length())
