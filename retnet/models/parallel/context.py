"""Context parallelism of a language model: the layers that it refuses. Processes share rows, as `ContextShard` says."""

import math

from retnet.layers.mixers import MIXERS
from retnet.layers.moe import MoEConfig
from retnet.models.config import ModelConfig


def check_layers_on_shards(config: ModelConfig) -> None:
    """Raise ValueError for layers that context parallelism does not take."""
    layers = [(f"layer {i}", layer) for i, layer in enumerate(config.layers)]
    if config.mtp is not None:
        layers.append(("mtp.block", config.mtp.block))
    for place, layer in layers:
        if layer.mixer.refused_on_shards:
            names = ", ".join(name for name, mixer in MIXERS.items() if not mixer.config.refused_on_shards)
            raise ValueError(
                f"{place} is {layer.mixer.kind}: {layer.mixer.refused_on_shards}; accepted with context: {names}"
            )
        if layer.mixer.longest_context < math.inf:
            raise ValueError(
                f"{place} has max_context {layer.mixer.longest_context}, and no process holds a whole row; accepted "
                "with context: max_context None"
            )
        if isinstance(layer.feed_forward, MoEConfig):
            raise ValueError(
                f"{place} is a mixture of experts, whose balance is that of whole rows; accepted with context: "
                "feed-forwards of one expert"
            )
