"""The parts that weights play in initialisation.

A module with linear maps names the part of each in a class attribute `PARTS`: submodule's name -> part. The table of
`retnet.models.init` gives the distribution of each part; a linear map without a part starts as "other". Parameters with
a rule of their own (decays, convolutions) are drawn by their module's `reset_own(generator)`.
"""

from collections.abc import Mapping
from typing import Literal

# "output" and "down" write to the residual stream, from a mixer and from a feed-forward.
Part = Literal["query_key", "value", "output", "feed_forward", "down", "embedding", "other"]
Parts = Mapping[str, Part]
