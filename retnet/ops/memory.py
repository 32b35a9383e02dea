"""Large results in huge pages: the first touch of fresh 4 KiB pages costs a CPU more than writing the values does."""

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor; Linux is advised to back its whole huge pages as such (advice: it may decline)."""
    x = torch.empty(shape, dtype=dtype)
    size = x.numel() * x.element_size()
    if size >= 4 * HUGE_PAGE and sys.platform == "linux":
        start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (x.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return x
