"""Parameters that stay float32 when a module is cast to half precision, such as decay rates.

Rounding a rate of 1e-4 per token to bfloat16 changes it by up to 0.4%, and with it what a head remembers over its
window. An optimizer's small steps on a bfloat16 rate would round to nothing.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Float32Parameters(nn.Module):
    """Base of modules with parameters that casts to half precision leave unchanged.

    FLOAT32_PARAMETERS: their names.
    """

    FLOAT32_PARAMETERS: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        parameters = {name: getattr(self, name, None) for name in self.FLOAT32_PARAMETERS}
        kept = {name: value.detach() for name, value in parameters.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < 4:
                parameter.data = value.to(parameter.device, torch.float32)
        return self
