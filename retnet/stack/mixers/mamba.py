"""`type: mamba`: the selective scan of Mamba-1 (arXiv 2312.00752) or the SSD of Mamba-2 (arXiv 2405.21060)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from retnet.plots.palette import COLOURS, Fill

from ..errors import Fault
from ..scalars import ONE_OF, MaybePositiveInt, PositiveInt
from ..section import OURS
from .settings import MixerSettings

if TYPE_CHECKING:
    from retnet.layers.mamba1 import Mamba1Config
    from retnet.layers.mamba2 import Mamba2Config

    from ..schema import Embedding, Model, Spec


class Mamba(MixerSettings):
    STATE_KEY = "ssm_state"
    GUIDE = "mamba"
    COLOUR: ClassVar[str] = COLOURS["mamba"]
    NEEDS_REGULARISATION = True

    variant: Annotated[Literal["mamba1", "mamba2"], ONE_OF] = "mamba2"
    d_state: PositiveInt = 64
    d_conv: PositiveInt = 4
    expand: PositiveInt = 2
    head_dim: MaybePositiveInt = Field(default=None, alias=OURS + "head_dim")

    def config(self, spec: Spec) -> Mamba1Config | Mamba2Config:
        inner_dim = spec.model.d_model * self.expand
        if self.variant == "mamba1":
            from retnet.layers.mamba1 import Mamba1Config

            rank = math.ceil(spec.model.d_model / 16)  # as in the paper's code
            return Mamba1Config(inner_dim, rank, state_dim=self.d_state, conv_width=self.d_conv)
        from retnet.layers.mamba2 import Mamba2Config

        head_dim = self.head_dim or widest_head(inner_dim)
        return Mamba2Config(inner_dim, head_dim=head_dim, state_dim=self.d_state, conv_width=self.d_conv)

    def family(self, name: str) -> tuple[str, Fill]:
        return self.variant, Fill(self.COLOUR, striped=self.variant == "mamba1")

    @property
    def reach_depends_on_input(self) -> bool:
        return True

    def words(self, name: str) -> str:
        return f"{self.variant}, state {self.d_state}"

    def faults(self, model: Model | None, embedding: Embedding | None) -> Iterator[Fault]:
        if self.head_dim is None:
            return
        if self.variant == "mamba1":
            yield Fault((OURS + "head_dim",), "mamba1 has no heads", "remove it, or write variant: mamba2")
        elif model is not None and model.d_model * self.expand % self.head_dim:
            inner = model.d_model * self.expand
            what = f"{self.head_dim} does not divide d_model * expand = {inner}"
            yield Fault((OURS + "head_dim",), what, f"write a divisor of {inner}")

    def estimate(self, model: Model) -> int:
        inner = model.d_model * self.expand
        projections = 3 * model.d_model * inner
        return projections + inner * self.d_conv + inner * (2 * self.d_state + 1)


def widest_head(inner_dim: int) -> int:
    """The largest of 64, 32, 16, ... that divides: the width of a Mamba-2 head, for which the schema has no key."""
    return next(width for width in (64, 32, 16, 8, 4, 2, 1) if inner_dim % width == 0)
