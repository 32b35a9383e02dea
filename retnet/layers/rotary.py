"""Rotary positions of queries and keys, from the options that attention and retention share."""

import math
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from retnet.layers.token_layout import TokenLayout
from retnet.ops.dtypes import wide_dtype
from retnet.ops.rotary import Llama3, Rotary, Scaling, Yarn, rotate_first, rotation
from retnet.system.choices import check_choices


class RotaryOptions(Protocol):
    """What a mixer's configuration says about positions."""

    @property
    def rotary(self) -> Literal["interleaved", "half", "none"]: ...
    @property
    def rotary_base(self) -> float: ...
    @property
    def rotary_dim(self) -> int | None: ...
    @property
    def position_scaling(self) -> Scaling: ...


class _RotaryNumbers(RotaryOptions, Protocol):
    @property
    def rotary_factor(self) -> float: ...


def check_rotary(options: _RotaryNumbers, head_dim: int) -> None:
    """Raise ValueError for a base, a factor or a width that turns no pair. head_dim: of the heads that rotate."""
    base, factor = options.rotary_base, options.rotary_factor
    if not (0 < base < math.inf and 0 < factor < math.inf):
        raise ValueError(f"rotary_base is {base}, rotary_factor {factor}; accepted: positive numbers")
    if isinstance(options.position_scaling, Yarn) and not base > 1:
        raise ValueError(f"rotary_base is {base} with YaRN; accepted: above 1")
    turned = options.rotary_dim
    if turned is not None and (options.rotary == "none" or turned % 2 or not 0 < turned <= head_dim):
        accepted = (
            "None without rotary" if options.rotary == "none" else f"an even number from 2 to {head_dim}, or None"
        )
        raise ValueError(f"rotary_dim is {turned}; accepted: {accepted}")


def check_rotary_scaling(given: Yarn | Llama3 | None, factor: float, yarn_length: int | None) -> None:
    """Raise ValueError for a scaling of frequencies with bad values, or beside one of positions."""
    if given is None:
        return
    check_choices(given)
    if factor != 1.0 or yarn_length is not None:
        raise ValueError("rotary_scaling is given with rotary_factor or rotary_yarn_length; accepted: one of them")


def prepare_rotation(options: RotaryOptions, layout: TokenLayout, head_dim: int, dtype: torch.dtype) -> None:
    """Compute the angles of this call's positions, for every layer with the same options."""
    if options.rotary != "none":
        _cos_sin(options, layout, options.rotary_dim or head_dim, dtype)


def rotate_heads(
    options: RotaryOptions, layout: TokenLayout, *heads: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Tensors [B, T, H, K], each rotated by its token's position; as they are if rotary is "none".

    With rotary_dim, its first components rotate, as a head of that width would, and the others stay. positions [B, T]:
    those of the tokens, if they are not the layout's.
    """
    if options.rotary == "none":
        return heads
    width = options.rotary_dim or heads[0].shape[-1]
    cos, sin = _cos_sin(options, layout, width, heads[0].dtype, positions)
    return tuple(rotate_first(x, cos, sin, cast(Rotary, options.rotary)) for x in heads)


def _cos_sin(
    options: RotaryOptions, layout: TokenLayout, head_dim: int, dtype: torch.dtype, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [B, T, K / 2]. head_dim: K, the components that rotate. Those at the layout's positions are shared."""
    rotary, base, dtype = cast(Rotary, options.rotary), options.rotary_base, wide_dtype(dtype)
    factor = options.position_scaling
    if positions is not None and positions is not layout.positions:
        return rotation(positions, rotary, head_dim, base, factor=factor, dtype=dtype)
    return layout.shared(
        ("rotation", rotary, head_dim, base, factor, dtype),
        lambda: rotation(layout.positions, rotary, head_dim, base, factor=factor, dtype=dtype),
    )
