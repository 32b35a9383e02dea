"""Rotary position embedding in the two conventions that RetNet weights use.

Both rotate pairs of q and k by an angle proportional to the position; they differ in which elements pair up and in the
frequencies, so weights trained with one do not work with the other:

* "interleaved" (torchscale, the paper's code): neighbours (2i, 2i + 1), frequencies base^-linspace(0, 1, K / 2);
* "half" (flash-linear-attention, Llama): halves (i, i + K / 2), frequencies base^-(2i / K).

Angles are computed in float32 from integer positions, never stored: bfloat16 cannot count past 256.

Three ways extend a trained context: dividing positions (linear scaling), and YaRN and Llama 3's scaling, which divide
low frequencies only. They are fixed when the model is built. Ways that change with the length of the text (dynamic NTK,
LongRoPE) are left out: keys in a cache would have to be rotated again.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Rotary = Literal["interleaved", "half"]


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071), for a model trained on `length` tokens that reads `factor` times as many.

    Pairs that rotate more than `fast` times within `length` keep their frequency, those that rotate less than `slow`
    times have it divided, and the frequencies between are blended linearly in their index, as in the authors' code.
    q and k are multiplied by `gain`.
    temperature: the gain; None for the paper's. whole_bounds: the blend begins and ends at whole indices.
    """

    factor: float
    length: int
    fast: float = 32.0
    slow: float = 1.0
    temperature: float | None = None
    whole_bounds: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "length", "fast", "slow")
        if self.temperature is not None:
            _check_positive(self, "temperature")

    @property
    def gain(self) -> float:
        """0.1 ln(factor) + 1 for each of q and k: the paper's temperature of attention."""
        return 0.1 * math.log(max(self.factor, 1.0)) + 1 if self.temperature is None else self.temperature

    def frequencies(self, plain: Tensor, rotary: Rotary, base: float) -> Tensor:
        """The frequencies [K / 2] of a convention, blended."""
        pairs = len(plain)
        last = pairs - 1 if rotary == "interleaved" else pairs  # the index at which a frequency would be 1 / base
        first_blended, last_blended = (
            last * math.log(self.length / (2 * math.pi * turns)) / math.log(base) for turns in (self.fast, self.slow)
        )
        if self.whole_bounds:
            first_blended, last_blended = math.floor(first_blended), math.ceil(last_blended)
        low, high = max(first_blended, 0), min(last_blended, 2 * pairs - 1)
        index = torch.arange(pairs, dtype=plain.dtype, device=plain.device)
        slow = ((index - low) / ((high - low) or 1e-3)).clamp(0, 1)
        return plain / self.factor * slow + plain * (1 - slow)


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling, for a model trained on `length` tokens that reads `factor` times as many.

    Pairs that rotate more than `fast` times within `length` keep their frequency, those that rotate less than `slow`
    times have it divided by `factor`, and between them it is blended linearly in the number of turns.
    """

    factor: float
    length: int
    slow: float = 1.0
    fast: float = 4.0
    kind: Literal["llama3"] = "llama3"
    gain: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "length", "slow", "fast")
        if not self.slow < self.fast:
            raise ValueError(f"slow is {self.slow}, fast {self.fast}; accepted: slow < fast")

    def frequencies(self, plain: Tensor, rotary: Rotary, base: float) -> Tensor:
        """The frequencies [K / 2] of a convention, blended."""
        turns = self.length * plain / (2 * math.pi)
        kept = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        return plain / self.factor * (1 - kept) + plain * kept


Scaling = float | Yarn | Llama3  # a number divides positions


def scaling(factor: float, yarn_length: int | None) -> Scaling:
    """The context extension of a layer: linear by `factor`, or YaRN from `yarn_length` tokens."""
    return factor if yarn_length is None else Yarn(factor, yarn_length)


def _check_positive(options: Yarn | Llama3, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; accepted: a positive number")


def frequencies(rotary: Rotary, key_dim: int, base: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians per token for each pair, [K / 2]."""
    pairs = torch.arange(key_dim // 2, dtype=torch.float64, device=device)
    if rotary == "interleaved":
        exponent = pairs / max(key_dim // 2 - 1, 1)
    else:
        exponent = 2 * pairs / key_dim
    return (base**-exponent).to(dtype)


def rotation(
    positions: Tensor,
    rotary: Rotary,
    key_dim: int,
    base: float,
    *,
    factor: Scaling = 1.0,
    dtype: torch.dtype = torch.float32,
    plain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) [B, T, K / 2] for positions [B, T]; `factor` divides positions (linear scaling), or scales them.

    YaRN's gain is included in cos and sin. plain: `frequencies` of the other arguments, if the caller keeps them.
    """
    if plain is None:
        plain = frequencies(rotary, key_dim, base, dtype=dtype, device=positions.device)
    if isinstance(factor, Yarn | Llama3):
        angle = positions.to(dtype)[..., None] * factor.frequencies(plain, rotary, base)
        return angle.cos() * factor.gain, angle.sin() * factor.gain
    angle = positions.to(dtype)[..., None] / factor * plain
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x [B, T, H, K] by (cos, sin) [B, T, K / 2]; computed in their dtype, returned in x's."""
    wide = x.to(cos.dtype)
    cos, sin = cos[:, :, None], sin[:, :, None]
    interleaved = rotary == "interleaved"
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    # Narrowed before they are joined, so that a compiler writes the result once, in x's dtype.
    rotated = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
    return torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first R components of x [B, T, H, K] by (cos, sin) [B, T, R / 2]. The others stay."""
    turned = 2 * cos.shape[-1]
    if turned == x.shape[-1]:
        return rotate(x, cos, sin, rotary)
    return torch.cat((rotate(x[..., :turned], cos, sin, rotary), x[..., turned:]), -1)
