"""Norms over the last dimension, computed in float32 whatever the input."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from retnet.ops.dtypes import wide_dtype

Norm = Literal["layer", "rms"]


def normalize(x: Tensor, kind: Norm, eps: float) -> Tensor:
    """x [..., D] with mean 0 and variance 1 ("layer") or mean square 1 ("rms"), in float32 (float64 for float64)."""
    x = x.to(wide_dtype(x.dtype))
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)
