"""Decay rates that stay float32 when a module is cast to half precision.

A rate of 1e-4 a token needs its digits: rounded to bfloat16 it changes by up to 0.4%, and so does everything that a
head remembers over its window; and an optimizer's small steps on it would round to nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FLOAT32_PARAMETERS = ("log_rate", "time_step_bias")


class Float32Parameters(nn.Module):
    """Base of mixers with learnable rates: casts leave FLOAT32_PARAMETERS as wide as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {
            name: getattr(self, name).detach() for name in FLOAT32_PARAMETERS if getattr(self, name, None) is not None
        }
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < 4:
                parameter.data = value.to(parameter.device, torch.float32)
        return self
