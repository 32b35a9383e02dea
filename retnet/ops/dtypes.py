"""Floating-point dtypes: those that models and operators take, by name, and the wider ones that sums are kept in."""

import torch
from torch import Tensor

from retnet.system.suggest import choices

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype given as such or by its name; None stays None. Raises ValueError for one that models do not have."""
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype is {str(dtype)!r}; {choices(dtype, DTYPES)}")
    return found


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: for sums, states, decays and angles, whatever the dtype of the data."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """x in float32, or float64; no call where it already is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
