"""What sums, states, decays and angles are kept in, whatever the dtype of the data."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
