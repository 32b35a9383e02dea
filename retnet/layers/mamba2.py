"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): a state space whose decay, input and output vectors depend on the token.

    z, x, B, C, dt = X W_in;   x, B, C = silu(conv(x, B, C));   dt = softplus(dt + bias);   A = -exp(log_rate)
    S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t)        y_t = C_t S_t + skip x_t
    out = rms_norm(y * silu(z)) W_out          (norm_before_gate: rms_norm(y) * silu(z))

Its recurrence is retention's (`retnet.ops.retention`) with q = C, k = B shared by groups of heads, v = dt x, a log
decay of dt A per token and head, and scale 1. Weights are those of the paper's code and of transformers'
Mamba2ForCausalLM.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.layers.growth import Growths
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.norm import check_eps
from retnet.layers.recompute import last_product
from retnet.layers.retention import RetentionDraft
from retnet.layers.retention_call import RetentionCall
from retnet.layers.short_convolution import ShortConvolution
from retnet.layers.state import LayerState, no_tokens
from retnet.layers.tensor_parallel import Part, Split, Splits, by_columns, by_rows, per_process
from retnet.layers.time_step import reset_time_step_bias
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightParts, WeightRoles
from retnet.ops.dtypes import wide_dtype
from retnet.ops.norms import normalize
from retnet.ops.retention import Mode
from retnet.ops.tensor_shard import TensorShard


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """inner_dim: width of x over all heads, usually twice the model's. state_dim: width of B and C. num_groups: groups
    of heads; the heads of a group share B and C. conv_width: tokens that the short convolution sees.

    time_step_min, time_step_max: initial range of dt, at least time_step_floor. time_step_lowest, time_step_highest:
    dt is clamped to them in every call. norm: before W_out, over each group of heads. projection_scales: factors of z,
    x, B, C and dt as they come from W_in (Falcon-H1, arXiv 2507.22448); None: 1.
    """

    refused_when_split = ""

    inner_dim: int
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    conv_width: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm: Literal["rms", "none"] = "rms"
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    projection_scales: tuple[float, ...] | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_lowest: float = 0.0
    time_step_highest: float | None = None
    mode: Mode = "auto"
    chunk_size: int | None = None
    kind: Literal["mamba2"] = "mamba2"

    def __post_init__(self) -> None:
        if isinstance(self.projection_scales, list):
            object.__setattr__(self, "projection_scales", tuple(self.projection_scales))
        super().__post_init__()
        for name in ("inner_dim", "head_dim", "state_dim", "num_groups", "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive integer")
        check_eps(self, "norm_eps")
        if self.inner_dim % self.head_dim:
            raise ValueError(f"head_dim is {self.head_dim}; accepted: a divisor of inner_dim ({self.inner_dim})")
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_groups is {self.num_groups}; accepted: a divisor of the {self.num_heads} heads")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min is {self.time_step_min}, time_step_max {self.time_step_max}; accepted: 0 < min <= max"
            )
        if self.time_step_lowest < 0:
            raise ValueError(f"time_step_lowest is {self.time_step_lowest}; accepted: 0 or more")
        scales = self.projection_scales
        if scales is not None and not (len(scales) == 5 and all(map(math.isfinite, scales))):
            raise ValueError(f"projection_scales is {scales}; accepted: five numbers, of z, x, B, C and dt, or None")
        if self.norm == "none" and self.norm_before_gate:
            raise ValueError("norm_before_gate is True with norm 'none'; accepted: norm 'rms'")

    @property
    def num_heads(self) -> int:
        return self.inner_dim // self.head_dim

    @property
    def call(self) -> RetentionCall:
        """The layer's call of retention, K = state_dim and V = head_dim; the heads of a group share B and C."""
        sizes = self.num_heads, self.state_dim, self.head_dim
        grouped = self.num_groups < self.num_heads
        return RetentionCall(*sizes, self.mode, self.chunk_size, per_token=True, grouped=grouped, scale=1.0)

    def part(self, rank: int, size: int) -> Self:
        heads = per_process("inner_dim / head_dim", self.num_heads, size)
        groups = per_process("num_groups", self.num_groups, size, or_one=True)
        return replace(self, inner_dim=heads * self.head_dim, num_groups=groups)

    def on_device(self, work: Workload) -> str | None:
        return self.call.chunk_note("mamba2", work)

    @property
    def projected(self) -> tuple[int, int, int, int, int]:
        """Widths of z, x, B, C and dt."""
        shared = self.num_groups * self.state_dim
        return self.inner_dim, self.inner_dim, shared, shared, self.num_heads

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution: x, B and C."""
        return self.inner_dim + 2 * self.num_groups * self.state_dim


@dataclass
class Mamba2State(LayerState):
    """memory [N, H, K, V] of the state space; recent [N, W - 1, C]: what the short convolution still reads."""

    memory: Tensor
    recent: Tensor


class Mamba2(MixerModule):
    """x [B, T, D] -> y [B, T, D], memory and the convolution's past."""

    WEIGHT_ROLES: ClassVar[WeightRoles] = {"in_proj": "value", "out_proj": "output"}
    GROWTH: ClassVar[Growths] = {"in_proj": ("hidden", "hidden", "readout", "readout", "readout")}
    FLOAT32_PARAMETERS = ("log_rate", "time_step_bias")

    def __init__(self, config: Mamba2Config, d_model: int):
        super().__init__()
        self.config = config
        self.call_retention = config.call
        self.in_proj = nn.Linear(d_model, sum(config.projected), bias=config.bias)
        self.conv = ShortConvolution(config.conv_dim, config.conv_width, config.conv_bias, "silu")
        self.log_rate = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.time_step_bias = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(config.num_heads))
        self.norm_weight = nn.Parameter(torch.ones(config.inner_dim)) if config.norm == "rms" else None
        self.out_proj = nn.Linear(config.inner_dim, d_model, bias=config.bias)
        self.reset_own()

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Rates -A uniform in [1, 16], as in the paper's code; time steps by their bounds; skip 1."""
        config = self.config
        with torch.no_grad():
            self.log_rate.uniform_(1, 16, generator=generator).log_()
        reset_time_step_bias(
            self.time_step_bias, config.time_step_min, config.time_step_max, config.time_step_floor, generator
        )
        nn.init.ones_(self.skip)

    def split_(self, shard: TensorShard) -> None:
        self.spans_processes = self.config.num_groups == 1
        super().split_(shard)
        self.call_retention = replace(self.config.call, split=True)

    def splits(self) -> Splits:
        inner, shared, heads = self._parts()
        return {
            **by_rows("in_proj", inner, inner, shared, shared, heads), **by_rows("conv", inner, shared, shared),
            "log_rate": Split(0, (heads,)), "time_step_bias": Split(0, (heads,)), "skip": Split(0, (heads,)),
            "norm_weight": Split(0, (inner,)), **by_columns("out_proj", inner.size),
        }  # fmt: skip

    def state_splits(self) -> Splits:
        inner, shared, heads = self._parts()
        return {"memory": Split(1, (heads,)), "recent": Split(2, (inner, shared, shared))}

    def _parts(self) -> tuple[Part, Part, Part]:
        """x, B (or C), and the heads, as processes divide them: B and C of a single group are held by all."""
        config = self.config
        shared = Part(config.num_groups * config.state_dim, config.num_groups > 1)
        return Part(config.inner_dim), shared, Part(config.num_heads)

    def weight_parts(self) -> WeightParts:
        return {"in_proj": self.config.projected}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> Mamba2State:
        """The state of `batch` sequences before their first token."""
        config = self.config
        shape = (batch, config.num_heads, config.state_dim, config.head_dim)
        memory = torch.zeros(shape, device=device, dtype=wide_dtype(dtype))
        return Mamba2State(no_tokens(batch, device), memory, self.conv.init_state(batch, device, dtype))

    def forward(
        self, x: Tensor, state: Mamba2State | None, layout: TokenLayout
    ) -> tuple[Tensor, Mamba2State | RetentionDraft | None]:
        if layout.must_pack(state):
            return layout.on_real_tokens(self, x, state)
        config, shared, x = self.config, self.config.num_groups * self.config.state_dim, self.entered(x)
        projected = self._scaled(self.in_proj(x))
        z, inputs, time_step = projected.split((config.inner_dim, config.conv_dim, config.num_heads), -1)
        u, recent = self.conv(inputs, None if state is None else state.recent, layout)
        u, B, C = u.split((config.inner_dim, shared, shared), -1)
        u, B, C = (
            part.unflatten(-1, (-1, n))
            for part, n in ((u, config.head_dim), (B, config.state_dim), (C, config.state_dim))
        )
        wide = wide_dtype(x.dtype)
        time_step = F.softplus(time_step.to(wide) + self.time_step_bias.to(wide))
        time_step = time_step.clamp(config.time_step_lowest, config.time_step_highest)
        v, log_decay = (u * time_step[..., None]).to(x.dtype), -self.log_rate.to(wide).exp() * time_step
        memory = None if state is None else state.memory
        out, memory = self.call_retention(C, B, v, log_decay, memory, layout)
        out = (out + self.skip[:, None] * u).flatten(-2)
        out = self._gated_norm(out, z)
        out = last_product(self.out_proj, out)
        if layout.deferred:
            return out, RetentionDraft(B, v, log_decay, inputs)
        return out, Mamba2State.after(state, layout, memory=memory, recent=recent) if memory is not None else None

    def _scaled(self, projected: Tensor) -> Tensor:
        """z, x, B, C and dt [..., sum], each with its factor."""
        config = self.config
        if config.projection_scales is None:
            return projected
        # Filled on the device: a copy from the host could not be captured in a graph.
        parts = zip(config.projected, config.projection_scales, strict=True)
        return projected * torch.cat([projected.new_full((width,), scale) for width, scale in parts])

    def _gated_norm(self, out: Tensor, z: Tensor) -> Tensor:
        wide = wide_dtype(out.dtype)
        gate, y = F.silu(z.to(wide)), out.to(wide)
        if self.norm_weight is None:
            return (y * gate).to(out.dtype)
        if self.config.norm_before_gate:
            return (self.norm_weight * self._normed(y) * gate).to(out.dtype)
        return (self.norm_weight * self._normed(y * gate).to(out.dtype)).to(out.dtype)

    def _normed(self, y: Tensor) -> Tensor:
        if self.shard is not None and self.spans_processes:  # the one group has channels of all processes
            squares = y.square().sum(-1, keepdim=True)
            squares = self.shard.share(self.shard.total(squares)) / (y.shape[-1] * self.shard.size)
            return y * (squares + self.config.norm_eps).rsqrt()
        return normalize(y.unflatten(-1, (self.config.num_groups, -1)), "rms", self.config.norm_eps).flatten(-2)


def mamba2_flops(config: Mamba2Config, work: Workload) -> MixerFlops:
    """Retention after a short convolution of W taps on every channel."""
    flops = config.call.flops(work)
    taps = 2 * config.conv_width * config.conv_dim
    return MixerFlops(flops.forward + taps, flops.decode + taps)
