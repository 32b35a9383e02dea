"""The layout of a tensor, by which passes are recorded (`recording.py`)."""

from torch import Tensor


def layout(x: Tensor | None) -> tuple | None:
    """What kernels depend on of a tensor: shape, strides, dtype, device, and the alignment of its address."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
