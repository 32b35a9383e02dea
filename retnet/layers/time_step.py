"""Initial time steps of Mamba: the bias decides how long a new model remembers."""

import math

import torch
from torch import Tensor


def reset_time_step_bias(
    bias: Tensor, low: float, high: float, floor: float, generator: torch.Generator | None = None
) -> None:
    """Draw softplus(bias) log-uniformly from [low, high], at least `floor` (arXiv 2312.00752, section 3.6)."""
    with torch.no_grad():
        start = torch.rand(bias.shape, dtype=torch.float64, device=bias.device, generator=generator)
        step = (math.log(low) + start * (math.log(high) - math.log(low))).exp().clamp_min(floor)
        bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus
