"""Mamba (Gu & Dao 2023, arXiv 2312.00752): a selective state space with one decay per channel and state.

    x, z = X W_in;   x = silu(conv(x));   dt, B, C = x W_x;   dt = softplus(dt W_dt + bias);   A = -exp(log_rate)
    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T        y_t = h_t C_t + skip x_t        out = (y * silu(z)) W_out

Weights are those of the paper's code and of transformers' MambaForCausalLM. The scan is `retnet.ops.selective_scan`.
With `scan_norm`, dt, B and C are normed before use: Jamba (Lieber et al. 2024, arXiv 2403.19887) does so to train large
models.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.layers.draft import Draft, accepted
from retnet.layers.growth import Growths
from retnet.layers.linear import WideBiasLinear
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.norm import check_eps, normed_heads
from retnet.layers.recompute import last_product
from retnet.layers.short_convolution import ShortConvolution, advance_recent_
from retnet.layers.state import LayerState, no_tokens
from retnet.layers.tensor_parallel import Part, Split, Splits, by_columns, by_rows, per_process
from retnet.layers.time_step import reset_time_step_bias
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightParts, WeightRoles
from retnet.ops.context_parallel import context_scan
from retnet.ops.dtypes import wide_dtype
from retnet.ops.selective_scan import selective_scan, selective_scan_step


@dataclass(frozen=True)
class Mamba1Config(MixerConfig):
    """inner_dim: width of x, usually twice the model's. state_dim: states per channel. time_step_rank: width between
    the two projections of dt, usually the model's width / 16. conv_width: tokens that the short convolution sees.

    time_step_min, time_step_max: initial range of dt, at least time_step_floor. time_step_scale: scale of the initial
    weights of the second projection of dt. scan_norm: "rms" norms dt (before its second projection), B and C, each with
    learnt weights.
    """

    refused_when_split = ""

    inner_dim: int
    time_step_rank: int
    state_dim: int = 16
    conv_width: int = 4
    conv_bias: bool = True
    bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_scale: float = 1.0
    scan_norm: Literal["rms", "none"] = "none"
    scan_norm_eps: float = 1e-6
    kind: Literal["mamba1"] = "mamba1"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inner_dim", "time_step_rank", "state_dim", "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive integer")
        check_eps(self, "scan_norm_eps")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min is {self.time_step_min}, time_step_max {self.time_step_max}; accepted: 0 < min <= max"
            )

    @property
    def projected(self) -> tuple[int, int, int]:
        """Widths of dt (before its second projection), B and C."""
        return self.time_step_rank, self.state_dim, self.state_dim

    def part(self, rank: int, size: int) -> Self:
        return replace(self, inner_dim=per_process("inner_dim", self.inner_dim, size))


@dataclass
class Mamba1State(LayerState):
    """memory [N, D, K]: K states for each of D channels; recent [N, W - 1, D]: what the short convolution reads."""

    memory: Tensor
    recent: Tensor


@dataclass
class Mamba1Draft(Draft):
    """x, step [B, T, D] and write [B, T, N] of the scan, its rate [D, N], and inputs [B, T, D] of the convolution."""

    x: Tensor
    step: Tensor
    rate: Tensor
    write: Tensor
    inputs: Tensor

    def _write_(self, state: Mamba1State, counts: Tensor) -> None:
        mask = accepted(counts, self.x.shape[1])
        for t in range(self.x.shape[1]):
            token = slice(t, t + 1)
            write = self.write[:, token]
            _, new = selective_scan_step(self.x[:, token], self.step[:, token], self.rate, write, write, state.memory)
            state.memory.copy_(torch.where(mask[:, t, None, None], new, state.memory))
        advance_recent_(state.recent, self.inputs, counts)


class Mamba1(MixerModule):
    """x [B, T, D] -> y [B, T, D], memory and the convolution's past."""

    WEIGHT_ROLES: ClassVar[WeightRoles] = {"in_proj": "value", "x_proj": "other", "out_proj": "output"}
    GROWTH: ClassVar[Growths] = {"x_proj": ("hidden", "readout", "readout"), "time_step_proj": "hidden"}
    FLOAT32_PARAMETERS = ("log_rate",)

    def __init__(self, config: Mamba1Config, d_model: int):
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(d_model, 2 * config.inner_dim, bias=config.bias)
        self.conv = ShortConvolution(config.inner_dim, config.conv_width, config.conv_bias, "silu")
        self.x_proj = nn.Linear(config.inner_dim, sum(config.projected), bias=False)
        self.step_norm_weight, self.write_norm_weight, self.read_norm_weight = (
            nn.Parameter(torch.ones(width)) if config.scan_norm == "rms" else None for width in config.projected
        )
        self.time_step_proj = WideBiasLinear(config.time_step_rank, config.inner_dim)
        self.log_rate = nn.Parameter(torch.empty(config.inner_dim, config.state_dim, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(config.inner_dim))
        self.out_proj = nn.Linear(config.inner_dim, d_model, bias=config.bias)
        self.reset_own()

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Rates -A of 1, 2, ..., N in every channel (S4D-real), time steps by their bounds, skip 1."""
        config = self.config
        with torch.no_grad():
            self.log_rate.copy_(torch.arange(1, config.state_dim + 1).log().expand_as(self.log_rate))
        bound = config.time_step_scale * config.time_step_rank**-0.5
        nn.init.uniform_(self.time_step_proj.weight, -bound, bound, generator=generator)
        reset_time_step_bias(
            self.time_step_proj.bias, config.time_step_min, config.time_step_max, config.time_step_floor, generator
        )
        nn.init.ones_(self.skip)

    def splits(self) -> Splits:
        inner = Part(self.config.inner_dim)
        channels = Split(0, (inner,))
        return {
            **by_rows("in_proj", inner, inner), **by_rows("conv", inner), **by_columns("x_proj", inner.size),
            **by_rows("time_step_proj", inner), **by_columns("out_proj", inner.size),
            "log_rate": channels, "skip": channels,
        }  # fmt: skip

    def state_splits(self) -> Splits:
        inner = Part(self.config.inner_dim)
        return {"memory": Split(1, (inner,)), "recent": Split(2, (inner,))}

    def weight_parts(self) -> WeightParts:
        config = self.config
        inputs = (config.inner_dim,) * 2
        return {"in_proj": inputs, "x_proj": config.projected}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> Mamba1State:
        """The state of `batch` sequences before their first token."""
        shape = (batch, self.config.inner_dim, self.config.state_dim)
        memory = torch.zeros(shape, device=device, dtype=wide_dtype(dtype))
        return Mamba1State(no_tokens(batch, device), memory, self.conv.init_state(batch, device, dtype))

    def forward(
        self, x: Tensor, state: Mamba1State | None, layout: TokenLayout
    ) -> tuple[Tensor, Mamba1State | Mamba1Draft | None]:
        if layout.must_pack(state):
            return layout.on_real_tokens(self, x, state)
        x = self.entered(x)
        inputs, z = self.in_proj(x).chunk(2, -1)
        u, recent = self.conv(inputs, None if state is None else state.recent, layout)
        low, write, read = self._scan_inputs(u)
        wide = wide_dtype(x.dtype)
        # The bias is large and negative: adding it in half precision would round the step.
        step = F.softplus(self.time_step_proj(low).to(wide))
        rate = -self.log_rate.to(wide).exp()
        if state is not None and layout.one_per_row:
            out, memory = selective_scan_step(u, step, rate, write, read, state.memory)
            if layout.mask is not None:
                memory = torch.where(layout.mask[..., None], memory, state.memory)
            memory = state.memory.copy_(memory) if layout.in_place else memory
        elif layout.context is not None:
            out, memory = context_scan(u, step, rate, write, read, layout.context, cu_seqlens=layout.cu_seqlens)
        else:
            before = None if state is None else state.memory
            out, memory = selective_scan(u, step, rate, write, read, state=before, cu_seqlens=layout.cu_seqlens)
        out = (out + self.skip * u) * F.silu(z)
        out = last_product(self.out_proj, out)
        if layout.deferred:
            return out, Mamba1Draft(u, step, rate, write, inputs)
        return out, Mamba1State.after(state, layout, memory=memory, recent=recent) if layout.carry else None

    def _scan_inputs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before its second projection [B, T, R], B and C [B, T, N]."""
        config, x = self.config, self.x_proj(u)
        if config.scan_norm != "none":  # on equal sums in all processes, so that the weights have equal gradients
            weights = (self.step_norm_weight, self.write_norm_weight, self.read_norm_weight)
            parts = zip(x.split(config.projected, -1), weights, strict=True)
            x = torch.cat([normed_heads(part, config.scan_norm, config.scan_norm_eps, w) for part, w in parts], -1)
        low, write, read = self.entered(x).split(config.projected, -1)
        return low, write, read


def mamba1_flops(config: Mamba1Config, work: Workload) -> MixerFlops:
    """N states for each of D channels, two multiply-adds and a product each, after a short convolution of W taps."""
    flops = 6 * config.inner_dim * config.state_dim + 2 * config.conv_width * config.inner_dim
    return MixerFlops(flops, flops)
