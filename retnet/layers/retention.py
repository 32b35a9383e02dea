"""Multi-scale retention, the paper's mixer (section 2.2, Eq. 8 and 9), with its published variants.

    Q, K = rotary(X W_Q, X W_K)    V = X W_V    Y = head_norm(retention(Q, K, V))    out = (swish(X W_G) * Y) W_O

The defaults are the paper's: value width 2 D, decays of Eq. 8, layer norm over each head, swish gate. Gated retention
makes the decay a function of the token, `sigmoid(x W)^(1/16)` (YOCO, arXiv 2405.05254, Eq. 7).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.layers.draft import Draft, accepted
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.norm import check_eps
from retnet.layers.retention_call import RetentionCall
from retnet.layers.rotary import check_rotary, prepare_rotation, rotate_heads
from retnet.layers.state import LayerState, no_tokens
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightRoles
from retnet.ops.decay import SCHEDULES, decay_norm
from retnet.ops.dtypes import wide_dtype
from retnet.ops.norms import normalize
from retnet.ops.retention import Mode, retention_step_
from retnet.ops.rotary import Scaling, scaling


@dataclass(frozen=True)
class RetentionConfig(MixerConfig):
    """One multi-scale retention layer; widths are totals over the heads.

    num_kv_heads: heads of k and v (num_heads if None), each shared by num_heads // num_kv_heads heads of q, whose
    decays stay their own.
    decay: "paper" (Eq. 8), "experiment" (section 3.1), "none" (gamma 1), "gated", one gamma for all heads, or a gamma
    for each head. learnable_decay: train the log decays as -exp(a), starting from `decay`. decay_norm: divide by the
    norm of the decay mask's row, as torchscale does. rotary_yarn_length: stretch rotary positions by rotary_factor with
    YaRN from this length, instead of dividing them.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    decay: str | float | tuple[float, ...] = "paper"
    learnable_decay: bool = False
    decay_norm: bool = False
    rotary: Literal["interleaved", "half", "none"] = "interleaved"
    rotary_base: float = 10000.0
    rotary_factor: float = 1.0
    rotary_yarn_length: int | None = None
    gate: Literal["swish", "none"] = "swish"
    head_norm: Literal["layer", "rms", "none"] = "layer"
    head_norm_affine: Literal["none", "shared", "per_head"] = "none"
    head_norm_eps: float = 1e-6
    num_kv_heads: int | None = None
    bias: bool = False
    mode: Mode = "auto"
    chunk_size: int | None = None
    kind: Literal["retention"] = "retention"

    def __post_init__(self) -> None:
        for name, width in (("key_dim", self.key_dim), ("value_dim", self.value_dim)):
            if self.num_heads < 1 or width < 1 or width % self.num_heads:
                raise ValueError(
                    f"{name} is {width} with num_heads {self.num_heads}; accepted: a multiple of num_heads"
                )
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; accepted: a divisor of num_heads {self.num_heads}")
        if self.rotary != "none" and self.head_key_dim % 2:
            raise ValueError(
                f"rotary turns pairs, but key_dim / num_heads is {self.head_key_dim}; accepted: an even number"
            )
        check_rotary(self)
        check_eps(self, "head_norm_eps")
        if isinstance(self.decay, list):
            object.__setattr__(self, "decay", tuple(self.decay))
        if isinstance(self.decay, str):
            accepted = (*SCHEDULES, "none", "gated")
            if self.decay not in accepted:
                raise ValueError(
                    f"decay is {self.decay!r}; accepted: {', '.join(accepted)}, a number, or one for each head"
                )
        else:
            gammas = self.decay if isinstance(self.decay, tuple) else (self.decay,)
            if len(gammas) not in (1, self.num_heads) or not all(0 <= gamma <= 1 for gamma in gammas):
                raise ValueError(
                    f"decay is {self.decay}; accepted: one number or {self.num_heads} (num_heads) between 0 and 1"
                )
        if self.learnable_decay and (
            self.log_decay is None or bool(((self.log_decay == 0) | self.log_decay.isinf()).any())
        ):
            raise ValueError(f"learnable_decay needs a start strictly between 0 and 1; decay is {self.decay!r}")
        if self.decay_norm and self.decay == "gated":
            raise ValueError(
                "decay_norm is defined for a decay fixed per head; accepted with decay 'gated': decay_norm false"
            )

    @property
    def position_scaling(self) -> Scaling:
        return scaling(self.rotary_factor, self.rotary_yarn_length)

    @property
    def head_key_dim(self) -> int:
        return self.key_dim // self.num_heads

    @property
    def head_value_dim(self) -> int:
        return self.value_dim // self.num_heads

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // (self.num_kv_heads or self.num_heads)

    def for_export(self, one_token: bool) -> Self:
        # "auto" would choose the form by the number of tokens in the example.
        return replace(self, mode="recurrent" if one_token else "parallel")

    @property
    def call(self) -> RetentionCall:
        """The layer's call of retention."""
        sizes = self.num_heads, self.head_key_dim, self.head_value_dim
        return RetentionCall(*sizes, self.mode, self.chunk_size, per_token=self.decay == "gated")

    def on_device(self, work: Workload) -> str | None:
        return self.call.chunk_note("retention", work)

    @property
    def log_decay(self) -> Tensor | None:
        """log gamma [H] that the layer starts from, float64, on the CPU whatever the default device; None if gated."""
        if self.decay == "gated":
            return None
        if self.decay == "none":
            return torch.zeros(self.num_heads, dtype=torch.float64, device="cpu")
        if isinstance(self.decay, str):
            return SCHEDULES[self.decay](self.num_heads, dtype=torch.float64)
        return torch.tensor(self.decay, dtype=torch.float64, device="cpu").log().expand(self.num_heads).clone()


@dataclass
class RetentionState(LayerState):
    """memory [N, H, K, V]: the sum of decayed k^T v over all tokens seen; float32 unless another was asked for."""

    memory: Tensor


@dataclass
class RetentionDraft(Draft):
    """k [B, T, G, K], v [B, T, H, V], log_decay [H] or [B, T, H] of T tokens."""

    k: Tensor
    v: Tensor
    log_decay: Tensor

    def _write_(self, state: Any, counts: Tensor) -> None:
        mask = accepted(counts, self.k.shape[1])
        retention_step_(self.k, self.k, self.v, self.log_decay, state.memory, mask=mask)


class MultiScaleRetention(MixerModule):
    """x [B, T, D] -> y [B, T, D], state [N, H, K, V]."""

    WEIGHT_ROLES: ClassVar[WeightRoles] = {
        "q_proj": "query_key",
        "k_proj": "query_key",
        "v_proj": "value",
        "gate_proj": "value",
        "out_proj": "output",
    }
    FLOAT32_PARAMETERS = ("log_rate",)
    GATE_POWER = 1 / 16  # keeps a gated decay near 1, so that heads remember long contexts

    def __init__(self, config: RetentionConfig, d_model: int):
        super().__init__()
        self.config = config
        self.call_retention = config.call
        bias = config.bias
        self.q_proj = nn.Linear(d_model, config.key_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, config.key_dim // config.heads_per_kv_head, bias=bias)
        self.v_proj = nn.Linear(d_model, config.value_dim // config.heads_per_kv_head, bias=bias)
        self.gate_proj = nn.Linear(d_model, config.value_dim, bias=bias) if config.gate == "swish" else None
        self.out_proj = nn.Linear(config.value_dim, d_model, bias=bias)
        self.decay_proj = nn.Linear(d_model, config.num_heads, bias=False) if config.decay == "gated" else None
        affine = {
            "none": None,
            "shared": (config.head_value_dim,),
            "per_head": (config.num_heads, config.head_value_dim),
        }
        shape = affine[config.head_norm_affine]
        self.head_norm_weight = nn.Parameter(torch.ones(shape)) if shape else None
        self.log_rate = (
            nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32)) if config.learnable_decay else None
        )
        # Not buffers: `.bfloat16()` would round gammas to 1, and meta-device initialisation would lose them.
        self._fixed_log_decay: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.reset_own()

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Start learnable decays from the schedule."""
        if self.log_rate is not None:
            with torch.no_grad():
                self.log_rate.copy_((-cast(Tensor, self.config.log_decay)).log())

    def log_decay(self, x: Tensor) -> Tensor:
        """[H], or [B, T, H] if gated; float32 (float64 for float64)."""
        wide = wide_dtype(x.dtype)
        if self.decay_proj is not None:
            return self.gated_log_decay(self.decay_proj(x))
        if self.log_rate is not None:
            return -self.log_rate.to(wide).exp()
        return self._fixed_log_decay_on(x.device, wide)

    def _fixed_log_decay_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (device, dtype)
        if key not in self._fixed_log_decay:
            with torch.inference_mode(False):
                self._fixed_log_decay[key] = cast(Tensor, self.config.log_decay).to(device, dtype)
        return self._fixed_log_decay[key]

    def gated_log_decay(self, opened: Tensor) -> Tensor:
        """log sigmoid(x W)^(1/16) from x W [..., H]."""
        return F.logsigmoid(opened.to(wide_dtype(opened.dtype))) * self.GATE_POWER

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        """Compute rotary angles that layers share, and fixed decays that calls share."""
        prepare_rotation(self.config, layout, self.config.head_key_dim, dtype)
        if self.decay_proj is None and self.log_rate is None:
            self._fixed_log_decay_on(layout.positions.device, wide_dtype(dtype))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> RetentionState:
        """The state of `batch` sequences before their first token."""
        config = self.config
        shape = (batch, config.num_heads, config.head_key_dim, config.head_value_dim)
        return RetentionState(no_tokens(batch, device), torch.zeros(shape, device=device, dtype=wide_dtype(dtype)))

    def forward(
        self, x: Tensor, state: RetentionState | None, layout: TokenLayout
    ) -> tuple[Tensor, RetentionState | RetentionDraft | None]:
        config = self.config
        q, k, v = (
            proj(x).unflatten(-1, (-1, width))
            for proj, width in (
                (self.q_proj, config.head_key_dim),
                (self.k_proj, config.head_key_dim),
                (self.v_proj, config.head_value_dim),
            )
        )
        q, k = rotate_heads(config, layout, q, k)
        if config.heads_per_kv_head > 1:
            k, v = (z.repeat_interleave(config.heads_per_kv_head, 2) for z in (k, v))
        log_decay = self.log_decay(x)
        memory = None if state is None else state.memory
        out, memory = self.call_retention(q, k, v, log_decay, memory, layout)
        if config.decay_norm:
            out = out / decay_norm(log_decay, layout.positions)[..., None].to(out.dtype)
        out = self._head_norm(out).flatten(-2).to(x.dtype)
        if self.gate_proj is not None:
            out = F.silu(self.gate_proj(x)) * out
        out = self.out_proj(out)
        if layout.deferred:
            return out, RetentionDraft(k, v, log_decay)
        return out, None if memory is None else RetentionState.after(state, layout, memory=memory)

    def _head_norm(self, out: Tensor) -> Tensor:
        if self.config.head_norm != "none":
            out = normalize(out, self.config.head_norm, self.config.head_norm_eps)
        return out if self.head_norm_weight is None else out * self.head_norm_weight


def retention_flops(config: RetentionConfig, work: Workload) -> MixerFlops:
    """The operation of all heads, without projections."""
    return config.call.flops(work)
