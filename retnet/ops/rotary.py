"""Rotary position embedding in the two conventions that RetNet weights use.

Both turn pairs of q and k by an angle proportional to the position; they differ in which elements pair up and in the
frequencies, so weights trained with one are nonsense under the other:

* "interleaved" (torchscale, the paper's code): neighbours (2i, 2i + 1), frequencies base^-linspace(0, 1, K / 2);
* "half" (flash-linear-attention, Llama): halves (i, i + K / 2), frequencies base^-(2i / K).

Angles are computed in float32 from integer positions, never stored: bfloat16 cannot count past 256.
"""

from typing import Literal

import torch
from torch import Tensor

Rotary = Literal["interleaved", "half"]


def frequencies(rotary: Rotary, key_dim: int, base: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians a token for each pair, [K / 2]."""
    pairs = torch.arange(key_dim // 2, dtype=torch.float64, device=device)
    if rotary == "interleaved":
        exponent = pairs / max(key_dim // 2 - 1, 1)
    else:
        exponent = 2 * pairs / key_dim
    return (base**-exponent).to(dtype)


def rotation(
    positions: Tensor, rotary: Rotary, key_dim: int, base: float, *, factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [B, T, K / 2] for positions [B, T]; `factor` divides positions (linear scaling of the context)."""
    angle = positions.to(dtype)[..., None] / factor * frequencies(rotary, key_dim, base, dtype=dtype, device=positions.device)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """Turn x [B, T, H, K] by (cos, sin) [B, T, K / 2]; computed in their dtype, returned in x's."""
    wide = x.to(cos.dtype)
    cos, sin = cos[:, :, None], sin[:, :, None]
    if rotary == "interleaved":
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = wide.chunk(2, -1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x.dtype)
