"""The roles of weights in initialisation.

A module with linear maps names the role of each in a class attribute `WEIGHT_ROLES`: submodule's name -> role. The
table of `retnet.models.init` gives the distribution of each role; a linear map without one starts as "other".
Parameters with a rule of their own (decays, convolutions) are drawn by their module's `reset_own(generator)`.
"""

from collections.abc import Mapping
from typing import Literal

# "output" and "down" write to the residual stream, from a mixer and from a feed-forward.
WeightRole = Literal["query_key", "value", "output", "feed_forward", "down", "embedding", "other"]
WeightRoles = Mapping[str, WeightRole]
