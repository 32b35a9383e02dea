"""Position-wise feed-forward: the paper's (d -> 2d -> d, gelu) and the gated family (SwiGLU, GeGLU, ReGLU).

    mlp:   W_down act(W_up x)          gated:  b W_down (act(a W_gate x) * W_up x)

a and b are 1, except in models trained with factors on activations (`gate_scale`, `down_scale`: Falcon-H1, arXiv
2507.22448). `inner_norm` normalises the input of W_down as well: Sub-LayerNorm (Foundation Transformers, arXiv
2210.06423).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from retnet.layers.norm import check_eps, make_norm
from retnet.layers.recompute import last_product
from retnet.layers.tensor_parallel import Part, Splits, TensorParallel, by_columns, by_rows, per_process
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightRoles
from retnet.ops.tensor_shard import TensorShard
from retnet.system.choices import check_choices

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}


@dataclass(frozen=True)
class FeedForwardConfig:
    """hidden_dim: width between the projections. gated: the GLU form, whose gate takes the activation.

    inner_norm: a norm with weights over hidden_dim, before the last projection. gate_scale, down_scale: factors of the
    gate's input to its activation (in the form without a gate, of W_up x), and of the result.
    """

    hidden_dim: int
    gated: bool = False
    activation: Literal["gelu", "relu", "swish"] = "gelu"
    bias: bool = False
    inner_norm: Literal["layer", "rms", "none"] = "none"
    inner_norm_eps: float = 1e-6
    gate_scale: float = 1.0
    down_scale: float = 1.0
    kind: Literal["feed_forward"] = "feed_forward"

    def __post_init__(self) -> None:
        check_choices(self)
        check_eps(self, "inner_norm_eps")
        for name in ("gate_scale", "down_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a finite number")
        if self.hidden_dim < 1:
            raise ValueError(f"hidden_dim is {self.hidden_dim}; accepted: a positive integer")

    def part(self, rank: int, size: int) -> "FeedForwardConfig":
        """The feed-forward of the channels of process `rank` of `size`. Raises ValueError where they do not divide."""
        if self.inner_norm != "none":
            raise ValueError(
                f"inner_norm is {self.inner_norm!r}, over the channels of all processes; accepted when split: 'none'"
            )
        return replace(self, hidden_dim=per_process("hidden_dim", self.hidden_dim, size))

    def idle_parameters(self, d_model: int) -> int:
        """Weights that a token does not use."""
        return 0


class FeedForward(TensorParallel):
    """x [..., D] -> [..., D]."""

    WEIGHT_ROLES: ClassVar[WeightRoles] = {"gate_proj": "feed_forward", "up_proj": "feed_forward", "down_proj": "down"}

    def __init__(self, config: FeedForwardConfig, d_model: int):
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(d_model, config.hidden_dim, bias=config.bias) if config.gated else None
        self.up_proj = nn.Linear(d_model, config.hidden_dim, bias=config.bias)
        self.inner_norm = make_norm(config.inner_norm, config.hidden_dim, config.inner_norm_eps)
        self.down_proj = nn.Linear(config.hidden_dim, d_model, bias=config.bias)

    def split_(self, shard: TensorShard) -> None:
        part = self.config.part(shard.rank, shard.size)
        super().split_(shard)
        self.config = part

    def splits(self) -> Splits:
        hidden = Part(self.config.hidden_dim)
        return {**by_rows("gate_proj", hidden), **by_rows("up_proj", hidden), **by_columns("down_proj", hidden.size)}

    def forward(self, x: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Each token is mapped alone; the layout is there for feed-forwards that need it (MoE)."""
        x = self.entered(x)
        if self.gate_proj is None:
            hidden = self.activation(self._at_scale(self.up_proj(x)))
        else:
            hidden = self.activation(self._at_scale(self.gate_proj(x))) * self.up_proj(x)
        out = last_product(self.down_proj, self.inner_norm(hidden))
        return out if self.config.down_scale == 1.0 else out * self.config.down_scale

    def _at_scale(self, x: Tensor) -> Tensor:
        return x if self.config.gate_scale == 1.0 else x * self.config.gate_scale
