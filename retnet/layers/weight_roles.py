"""The roles of weights in initialisation.

A module with linear maps names the role of each in a class attribute `WEIGHT_ROLES`: submodule's name -> role. The
table of `retnet.models.init` gives the distribution of each role; a linear map without one starts as "other".
Parameters with a rule of their own (decays, convolutions) are drawn by their module's `reset_own(generator)`.

A projection that is several maps in one product, such as Mamba-2's of z, x, B, C and the time step, gives the rows of
each in the method `weight_parts()`: submodule's name -> numbers of rows, in order. Muon orthogonalises each part alone.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import nn

# "output" and "down" write to the residual stream, from a mixer and from a feed-forward.
WeightRole = Literal["query_key", "value", "output", "feed_forward", "down", "embedding", "other"]
WeightRoles = Mapping[str, WeightRole]
WeightParts = Mapping[str, tuple[int, ...]]


def named_roles(model: nn.Module) -> dict[nn.Module, WeightRole]:
    """The role of each submodule that its owner's WEIGHT_ROLES names."""
    owned = [(module, getattr(module, "WEIGHT_ROLES", {})) for module in model.modules()]
    children = [(getattr(module, name), role) for module, roles in owned for name, role in roles.items()]
    return {child: role for child, role in children if child is not None}


def parts_of_products(model: nn.Module) -> dict[nn.Module, tuple[int, ...]]:
    """The rows of each map in the projections that are several."""
    owned = [
        (module, cast(Any, module).weight_parts()) for module in model.modules() if hasattr(module, "weight_parts")
    ]
    return {getattr(module, name): rows for module, parts in owned for name, rows in parts.items()}
