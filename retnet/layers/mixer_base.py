"""Bases of mixers: what a mixer's configuration and module tell the rest of the package.

One file per mixer holds its configuration, state, draft, module and cost; a line of `retnet.layers.mixers` registers
it.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch

from retnet.layers.float32_parameters import Float32Parameters
from retnet.layers.state import LayerState
from retnet.layers.tensor_parallel import TensorParallel
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightParts, WeightRoles
from retnet.ops.tensor_shard import TensorShard
from retnet.system.choices import check_choices


class MixerConfig:
    """Base of mixers' configurations: frozen dataclasses of plain values, told apart in JSON by `kind`.

    refused_by_engine, refused_on_shards, refused_when_split: why the engine, context parallelism, and tensor
    parallelism do not take layers of this mixer; empty if they do.
    """

    kind: Any  # the last field of every subclass, a Literal
    refused_by_engine: ClassVar[str] = ""
    refused_on_shards: ClassVar[str] = ""
    refused_when_split: ClassVar[str] = "it does not say how its heads are divided"

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def kept_tokens(self) -> float:
        """How many tokens the state stores one by one: 0 (a state of constant size), a window, or math.inf."""
        return 0

    @property
    def leaves(self) -> "tuple[MixerConfig, ...]":
        """The mixers that hold weights and states: this one, or those inside it."""
        return (self,)

    @property
    def depth(self) -> int:
        """The layers that a token passes one after another here."""
        return 1

    def idle_parameters(self, d_model: int) -> int:
        """Weights that a token does not use."""
        return 0

    @property
    def longest_context(self) -> float:
        """Tokens of the longest sequence that the mixer is defined for."""
        return math.inf

    def on_device(self, work: "Workload") -> str | None:
        """A sentence about how the layer runs there, if its configuration alone does not determine that."""
        return None

    def part(self, rank: int, size: int) -> Self:
        """The mixer of the heads of process `rank` of `size`. Raises ValueError where the heads do not divide."""
        raise ValueError(self.refused_when_split)

    def for_export(self, one_token: bool) -> Self | None:
        """This mixer in plain operators, for graphs of one token or of several; None if it cannot be exported."""
        return None


class MixerModule(Float32Parameters, TensorParallel):
    """Base of mixers: `forward(x [B, T, D], state, layout) -> (y [B, T, D], state)`.

    The returned state is None unless `layout.carry`; with `layout.deferred` it is the draft of these tokens.
    WEIGHT_ROLES, weight_parts: as in `retnet.layers.weight_roles`. RECOMPUTES_ITSELF: the mixer consists of blocks,
    which carry out `layout.recompute`.
    """

    RECOMPUTES_ITSELF: ClassVar[bool] = False
    WEIGHT_ROLES: ClassVar[WeightRoles] = {}
    config: Any

    def split_(self, shard: TensorShard) -> None:
        """As in `TensorParallel`; the configuration becomes that of the process's own heads."""
        part = self.config.part(shard.rank, shard.size)
        super().split_(shard)
        self.config = part

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        """Compute what is shared with other layers and calls: a block compiled or recomputed alone only reads it."""

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> LayerState:
        """The state of `batch` sequences before their first token, with room for `num_tokens` each if it grows.

        dtype: of the activations.
        """
        raise NotImplementedError

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Draw the parameters that are not linear maps."""

    def weight_parts(self) -> WeightParts:
        """The rows of each map in projections that are several, by the submodule's name."""
        return {}


@dataclass(frozen=True)
class Workload:
    """The sequences that a cost is counted for: `context` tokens each, in a model of width d_model."""

    d_model: int
    context: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


class MixerFlops(NamedTuple):
    """Floating-point operations per token beside the projections: in a whole sequence, and for the token after it."""

    forward: float
    decode: float
