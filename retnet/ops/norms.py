"""Norms over the last dimension, computed in float32 whatever the input."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from retnet.ops.derivatives import transforms_active
from retnet.ops.dtypes import wide_dtype

Norm = Literal["layer", "rms"]


def normalize(x: Tensor, kind: Norm, eps: float) -> Tensor:
    """x [..., D] with mean 0 and variance 1 ("layer") or mean square 1 ("rms"), in float32 (float64 for float64)."""
    x = x.to(wide_dtype(x.dtype))
    if kind == "layer":
        return layer_norm(x, None, None, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension, in x's dtype."""
    if not transforms_active():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # Up to torch 2.13 at least, the reverse derivative of F.layer_norm's forward derivative is wrong without an error.
    wide = x.to(wide_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(x.dtype)
