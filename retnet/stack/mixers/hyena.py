"""`type: hyena`: gated long convolutions (arXiv 2302.10866)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from retnet.plots.palette import COLOURS

from ..scalars import NonNegative, PositiveInt
from .settings import MixerSettings

if TYPE_CHECKING:
    from retnet.layers.hyena import HyenaConfig

    from ..schema import Model, Spec


class Hyena(MixerSettings):
    GUIDE = "hyena"
    COLOUR: ClassVar[str] = COLOURS["hyena"]
    NEEDS_REGULARISATION = True

    depth: PositiveInt = 2
    filter_hidden: PositiveInt = 64
    filter_decay: NonNegative = 0.0

    def config(self, spec: Spec) -> HyenaConfig:
        from retnet.layers.hyena import HyenaConfig

        return HyenaConfig(order=self.depth, filter_hidden=self.filter_hidden, filter_decay=self.filter_decay)

    def words(self, name: str) -> str:
        return f"{name}, order {self.depth}"

    def estimate(self, model: Model) -> int:
        return 2 * model.d_model * model.d_model + model.d_model * self.filter_hidden * self.depth
