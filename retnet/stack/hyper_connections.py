"""The `hyper` section of a stack file: several residual streams per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .scalars import ONE_OF, Flag, Iterations, StreamCount
from .section import OURS, Section

if TYPE_CHECKING:
    from retnet.layers.hyper_connection import HyperConnectionConfig


class HyperConnections(Section):
    """Keys with the prefix `vendor.retnet.` are ours; `HyperConnectionConfig` explains them."""

    expand: StreamCount
    mixing: Annotated[Literal["birkhoff", "unconstrained", "learned_lowrank"], ONE_OF] = "birkhoff"
    sinkhorn_iters: Iterations = 3
    dynamic: Flag = Field(default=True, alias=OURS + "dynamic")

    def config(self) -> HyperConnectionConfig:
        from retnet.layers.hyper_connection import HyperConnectionConfig

        return HyperConnectionConfig(self.expand, self.mixing, self.sinkhorn_iters, self.dynamic)

    def words(self) -> str:
        """'4 residual streams (birkhoff, 3 iterations)', '2 residual streams (unconstrained, static)'."""
        many = "one residual stream" if self.expand == 1 else f"{self.expand} residual streams"
        iterations = f", {self.sinkhorn_iters} iteration{'' if self.sinkhorn_iters == 1 else 's'}"
        kind = self.mixing + (iterations if self.mixing == "birkhoff" else "")
        return f"{many} ({kind}{'' if self.dynamic else ', static'})"
