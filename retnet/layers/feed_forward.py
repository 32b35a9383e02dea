"""Position-wise feed-forward: the paper's (d -> 2d -> d, gelu) and the gated family (SwiGLU, GeGLU, ReGLU).

    mlp:   W_down act(W_up x)          gated:  W_down (act(W_gate x) * W_up x)
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}


@dataclass(frozen=True)
class FeedForwardConfig:
    """hidden_dim: width between the projections. gated: the GLU form, whose gate takes the activation."""

    hidden_dim: int
    gated: bool = False
    activation: Literal["gelu", "relu", "swish"] = "gelu"
    bias: bool = False
    kind: Literal["feed_forward"] = "feed_forward"

    def __post_init__(self) -> None:
        if self.hidden_dim < 1:
            raise ValueError(f"hidden_dim is {self.hidden_dim}; accepted: a positive integer")


class FeedForward(nn.Module):
    """x [..., D] -> [..., D]."""

    def __init__(self, config: FeedForwardConfig, d_model: int):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(d_model, config.hidden_dim, bias=config.bias) if config.gated else None
        self.up_proj = nn.Linear(d_model, config.hidden_dim, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden_dim, d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
