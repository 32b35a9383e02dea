"""Wide dtypes: what sums, states, decays and angles are kept in, whatever the dtype of the data."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """x in float32, or float64; no call where it already is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
