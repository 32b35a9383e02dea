"""Norms over the last dimension, computed in float32 whatever the input."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["layer", "rms"]


def normalize(x: Tensor, kind: Norm, eps: float) -> Tensor:
    """x [..., D] with mean 0 and variance 1 ("layer") or mean square 1 ("rms"), in float32 (float64 for float64)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)
