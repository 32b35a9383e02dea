"""Rotary positions of queries and keys, from the options that attention and retention share."""

from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from retnet.layers.token_layout import TokenLayout
from retnet.ops.dtypes import wide_dtype
from retnet.ops.rotary import Rotary, rotate, rotation, scaling


class RotaryOptions(Protocol):
    """rotary_factor: positions are divided by it, or stretched by it with YaRN from rotary_yarn_length tokens."""

    @property
    def rotary(self) -> Literal["interleaved", "half", "none"]: ...
    @property
    def rotary_base(self) -> float: ...
    @property
    def rotary_factor(self) -> float: ...
    @property
    def rotary_yarn_length(self) -> int | None: ...


def prepare_rotation(options: RotaryOptions, layout: TokenLayout, head_dim: int, dtype: torch.dtype) -> None:
    """Compute the angles of this call's positions, for every layer with the same options."""
    if options.rotary != "none":
        _cos_sin(options, layout, head_dim, dtype)


def rotate_heads(options: RotaryOptions, layout: TokenLayout, *heads: Tensor) -> tuple[Tensor, ...]:
    """Tensors [B, T, H, K], each rotated by its token's position; as they are if rotary is "none"."""
    if options.rotary == "none":
        return heads
    cos, sin = _cos_sin(options, layout, heads[0].shape[-1], heads[0].dtype)
    return tuple(rotate(x, cos, sin, options.rotary) for x in heads)


def _cos_sin(options: RotaryOptions, layout: TokenLayout, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [B, T, K / 2] at the layout's positions."""
    rotary, base, dtype = cast(Rotary, options.rotary), options.rotary_base, wide_dtype(dtype)
    factor = scaling(options.rotary_factor, options.rotary_yarn_length)
    return layout.shared(
        ("rotation", rotary, head_dim, base, factor, dtype),
        lambda: rotation(layout.positions, rotary, head_dim, base, factor=factor, dtype=dtype),
    )
