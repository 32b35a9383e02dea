"""Feed-forward widths that give stacks with different mixers equal numbers of parameters."""

from collections.abc import Callable

from retnet import ModelConfig
from retnet.models.cost import parameter_counts


def with_equal_parameters(build: Callable[[int], ModelConfig], target: int, step: int) -> ModelConfig:
    """`build` at the feed-forward width, a multiple of `step`, whose parameters are nearest to `target`.

    The number of parameters must be linear in the width.
    """
    one, two = (parameter_counts(build(width))["total"] for width in (step, 2 * step))
    return build(max(1, 1 + round((target - one) / (two - one))) * step)
