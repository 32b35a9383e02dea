"""Linear layers of wider precision than their weights, and the question whether a layer is nothing but its weights.

Weights are read by calling their module, never around it: an adapter, a quantised weight, an offloading or any other
hook changes what the call computes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.ops.dtypes import wide_dtype


class WideLinear(nn.Linear):
    """x [..., in] -> [..., out] in float32 (float64 for float64), also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(wide_dtype(self.weight.dtype), wide_dtype(input.dtype))
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(wide), self.weight.to(wide), bias)


class WideBiasLinear(nn.Linear):
    """x [..., in] -> [..., out]: the product in x's dtype, and the bias added in float32 or wider."""

    def forward(self, input: Tensor) -> Tensor:
        product = F.linear(input, self.weight)
        wide = wide_dtype(product.dtype)
        return product.to(wide) + self.bias.to(wide)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs the `forward` of its class and of all modules in it, and nothing else."""
    return not any(has_hooks(vars(part)) for part in module.modules())


def has_hooks(own: dict[str, Any]) -> bool:
    """Whether the attributes of a module hold a hook, or a `forward` of its own."""
    return "forward" in own or bool(own["_forward_hooks"]) or bool(own["_forward_pre_hooks"])


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling a linear layer is the product with its weight alone, so that a fused product may read it.

    False for adapters, quantised or sharded weights, offloading and other hooks.
    """
    kinds = (nn.Linear, WideLinear, WideBiasLinear)
    plain = type(module) in kinds and all(type(weight) is nn.Parameter for weight in module.parameters())
    return plain and is_unhooked(module) and not torch.nn.modules.module._has_any_global_hook()
