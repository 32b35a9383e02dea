"""Multi-scale retention, the paper's mixer (section 2.2, Eq. 8 and 9), with its published variants.

    Q, K = rotary(X W_Q, X W_K)    V = X W_V    Y = head_norm(retention(Q, K, V))    out = (swish(X W_G) * Y) W_O

The defaults are the paper's: value width 2 D, decays of Eq. 8, layer norm over each head, swish gate. Gated retention
makes the decay a function of the token, `sigmoid(x W)^(1/16)` (YOCO, arXiv 2405.05254, Eq. 7). A short causal
convolution on Q, K and V before the rotation, as in Mamba and H3 (arXiv 2212.14052), lets a head compare a token with
its neighbours' predecessors, which recall needs.

Lightning attention (arXiv 2401.04658; MiniMax-Text-01, arXiv 2501.08313) is this mixer with other options: decays from
ALiBi's slopes, scaled per layer; an activation of Q, K and V; a head norm over several heads together; a sigmoid gate.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.layers.draft import Draft, accepted
from retnet.layers.growth import Growths
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.norm import HeadNorm, check_eps, head_norm_weight, normed_heads
from retnet.layers.recompute import last_product
from retnet.layers.retention_call import RetentionCall
from retnet.layers.rotary import check_rotary, check_rotary_scaling, prepare_rotation, rotate_heads
from retnet.layers.short_convolution import ShortConvolution, advance_recent_
from retnet.layers.state import LayerState, no_tokens
from retnet.layers.tensor_parallel import Part, Split, Splits, by_columns, by_rows, per_process
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightRoles
from retnet.ops.decay import SCHEDULES, decay_norm
from retnet.ops.derivatives import transforms_active
from retnet.ops.dtypes import wide_dtype
from retnet.ops.norms import normalize
from retnet.ops.retention import Mode, retention_step_
from retnet.ops.rotary import Llama3, Scaling, Yarn, scaling
from retnet.ops.tensor_shard import TensorShard
from retnet.system.checks import is_integer
from retnet.system.suggest import did_you_mean

GATES = {"swish": F.silu, "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class RetentionConfig(MixerConfig):
    """One multi-scale retention layer; widths are totals over the heads.

    num_kv_heads: heads of k and v (num_heads if None), each shared by num_heads // num_kv_heads heads of q, whose
    decays stay their own.
    decay: "paper" (Eq. 8), "experiment" (section 3.1), "alibi" (lightning attention), "none" (gamma 1), "gated", one
    gamma for all heads, or a gamma for each head. decay_scale multiplies log gamma. learnable_decay: train the log
    decays as -exp(a), starting from `decay`. decay_norm: divide by the norm of the decay mask's row, as torchscale
    does. gated_start: the schedule that the heads of a gated decay start from, as a learnt bias; without one, all heads
    start near 0.96.
    rotary_yarn_length: stretch rotary positions by rotary_factor with YaRN from this length, instead of dividing them.
    rotary_scaling, in their place, scales frequencies.
    rotary_dim: first components of a head of q and k that rotate (None: all), as in partial rotary.
    conv_width: tokens that the short convolution on each of `conv_on` sees (None: no convolution); conv_activation
    follows it. qkv_activation: of q, k and v after their projections. qk_norm: norm over each head of q and k before
    the rotation; "rms" has learnt weights, "l2" has none.
    head_norm_groups: parts of equal numbers of heads that the head norm takes together (None: each head alone; 1: all
    heads).
    """

    refused_when_split = ""

    num_heads: int
    key_dim: int
    value_dim: int
    decay: str | float | tuple[float, ...] = "paper"
    decay_scale: float = 1.0
    learnable_decay: bool = False
    gated_start: str | None = None
    decay_norm: bool = False
    rotary: Literal["interleaved", "half", "none"] = "interleaved"
    rotary_base: float = 10000.0
    rotary_factor: float = 1.0
    rotary_yarn_length: int | None = None
    rotary_scaling: Yarn | Llama3 | None = None
    rotary_dim: int | None = None
    conv_width: int | None = None
    conv_on: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
    conv_activation: Literal["silu", "none"] = "silu"
    qkv_activation: Literal["silu", "none"] = "none"
    qk_norm: HeadNorm = "none"
    qk_norm_eps: float = 1e-6
    gate: Literal["swish", "sigmoid", "none"] = "swish"
    head_norm: Literal["layer", "rms", "none"] = "layer"
    head_norm_affine: Literal["none", "shared", "per_head"] = "none"
    head_norm_eps: float = 1e-6
    head_norm_groups: int | None = None
    num_kv_heads: int | None = None
    bias: bool = False
    mode: Mode = "auto"
    chunk_size: int | None = None
    kind: Literal["retention"] = "retention"

    def __post_init__(self) -> None:
        for name in ("decay", "conv_on"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        for name, width in (("key_dim", self.key_dim), ("value_dim", self.value_dim)):
            if self.num_heads < 1 or width < 1 or width % self.num_heads:
                raise ValueError(
                    f"{name} is {width} with num_heads {self.num_heads}; accepted: a multiple of num_heads"
                )
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; accepted: a divisor of num_heads {self.num_heads}")
        if self.rotary != "none" and self.rotary_dim is None and self.head_key_dim % 2:
            raise ValueError(
                f"rotary turns pairs, but key_dim / num_heads is {self.head_key_dim}; accepted: an even number"
            )
        check_rotary(self, self.head_key_dim)
        check_rotary_scaling(self.rotary_scaling, self.rotary_factor, self.rotary_yarn_length)
        check_eps(self, "head_norm_eps")
        check_eps(self, "qk_norm_eps")
        self._check_convolution()
        groups = self.head_norm_groups
        if groups is not None and (groups < 1 or self.num_heads % groups):
            raise ValueError(
                f"head_norm_groups is {groups}; accepted: a divisor of num_heads {self.num_heads}, or None"
            )
        self._check_decay()

    def _check_decay(self) -> None:
        if isinstance(self.decay, str):
            accepted = (*SCHEDULES, "none", "gated")
            if self.decay not in accepted:
                raise ValueError(
                    f"decay is {self.decay!r}; accepted: {', '.join(accepted)}, a number, or one for each head"
                    f"{did_you_mean(self.decay, accepted)}"
                )
        else:
            gammas = self.decay if isinstance(self.decay, tuple) else (self.decay,)
            if len(gammas) not in (1, self.num_heads) or not all(0 <= gamma <= 1 for gamma in gammas):
                raise ValueError(
                    f"decay is {self.decay}; accepted: one number or {self.num_heads} (num_heads) between 0 and 1"
                )
        if not 0 < self.decay_scale < math.inf:
            raise ValueError(f"decay_scale is {self.decay_scale}; accepted: a positive number")
        if self.learnable_decay and (
            self.log_decay is None or bool(((self.log_decay == 0) | self.log_decay.isinf()).any())
        ):
            raise ValueError(f"learnable_decay needs a start strictly between 0 and 1; decay is {self.decay!r}")
        if self.decay_norm and self.decay == "gated":
            raise ValueError(
                "decay_norm is defined for a decay fixed per head; accepted with decay 'gated': decay_norm false"
            )
        if self.gated_start is not None and (self.decay != "gated" or self.gated_start not in SCHEDULES):
            raise ValueError(
                f"gated_start is {self.gated_start!r} with decay {self.decay!r}; accepted: None, or with decay 'gated' "
                f"{', '.join(SCHEDULES)}"
            )

    def _check_convolution(self) -> None:
        width, parts = self.conv_width, self.conv_on
        if width is not None and not is_integer(width, 2, 8):
            raise ValueError(f"conv_width is {width!r}; accepted: None, or 2 to 8 tokens")
        if not parts or parts != tuple(part for part in "qkv" if part in parts):
            raise ValueError(f"conv_on is {parts!r}; accepted: one or more of 'q', 'k', 'v', in this order")
        if width is not None and self.qkv_activation != "none":
            raise ValueError(
                f"qkv_activation is {self.qkv_activation!r} with conv_width {width}; accepted with a convolution: "
                "'none', as conv_activation follows it"
            )

    @property
    def projected(self) -> dict[str, int]:
        """Widths of q, k and v, summed over their heads."""
        shared = self.heads_per_kv_head
        return {"q": self.key_dim, "k": self.key_dim // shared, "v": self.value_dim // shared}

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution; 0 without one."""
        return 0 if self.conv_width is None else sum(self.projected[part] for part in self.conv_on)

    @property
    def position_scaling(self) -> Scaling:
        return self.rotary_scaling or scaling(self.rotary_factor, self.rotary_yarn_length)

    @property
    def head_key_dim(self) -> int:
        return self.key_dim // self.num_heads

    @property
    def head_value_dim(self) -> int:
        return self.value_dim // self.num_heads

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // (self.num_kv_heads or self.num_heads)

    def part(self, rank: int, size: int) -> Self:
        heads = per_process("num_heads", self.num_heads, size)
        groups = self.num_kv_heads
        if groups is not None:
            groups = per_process("num_kv_heads", groups, size, or_one=True)
        decays, log_decay = {}, self.log_decay
        if log_decay is not None:
            own = tuple(log_decay.exp().tolist())[rank * heads : (rank + 1) * heads]
            decays = {"decay": own, "decay_scale": 1.0}
        normed = self.head_norm_groups
        if normed is not None:
            normed = per_process("head_norm_groups", normed, size)
        widths = {"key_dim": self.key_dim // size, "value_dim": self.value_dim // size}
        return replace(self, num_heads=heads, num_kv_heads=groups, head_norm_groups=normed, **decays, **widths)

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
            return SCHEDULES[self.decay](self.num_heads, dtype=torch.float64) * self.decay_scale
        gammas = torch.tensor(self.decay, dtype=torch.float64, device="cpu")
        return gammas.log().expand(self.num_heads) * self.decay_scale


@dataclass
class RetentionState(LayerState):
    """memory [N, H, K, V]: the sum of decayed k^T v over all tokens seen; float32 unless another was asked for.

    recent [N, W - 1, C]: inputs that the short convolution still reads; None without one.
    """

    memory: Tensor
    recent: Tensor | None = None


@dataclass
class RetentionDraft(Draft):
    """k [B, T, G, K], v [B, T, H, V], log_decay [H] or [B, T, H] of T tokens; inputs [B, T, C] of the convolution."""

    k: Tensor
    v: Tensor
    log_decay: Tensor
    inputs: Tensor | None = None

    def _write_(self, state: Any, counts: Tensor) -> None:
        mask = accepted(counts, self.k.shape[1])
        retention_step_(self.k, self.k, self.v, self.log_decay, state.memory, mask=mask)
        if self.inputs is not None:
            advance_recent_(state.recent, self.inputs, counts)


class MultiScaleRetention(MixerModule):
    """x [B, T, D] -> y [B, T, D], state [N, H, K, V]."""

    WEIGHT_ROLES: ClassVar[WeightRoles] = {
        "q_proj": "query_key",
        "k_proj": "query_key",
        "v_proj": "value",
        "gate_proj": "value",
        "out_proj": "output",
    }
    GROWTH: ClassVar[Growths] = {"decay_proj": "readout"}
    FLOAT32_PARAMETERS = ("log_rate",)
    GATE_POWER = 1 / 16  # keeps a gated decay near 1, so that heads remember long contexts

    def __init__(self, config: RetentionConfig, d_model: int):
        super().__init__()
        self.config = config
        self.call_retention = config.call
        bias = config.bias
        self.q_proj = nn.Linear(d_model, config.key_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, config.projected["k"], bias=bias)
        self.v_proj = nn.Linear(d_model, config.projected["v"], bias=bias)
        self.conv = None
        if config.conv_width is not None:
            self.conv = ShortConvolution(config.conv_dim, config.conv_width, False, config.conv_activation)
        self.q_norm_weight = head_norm_weight(config.qk_norm, config.head_key_dim)
        self.k_norm_weight = head_norm_weight(config.qk_norm, config.head_key_dim)
        self.gate_proj = nn.Linear(d_model, config.value_dim, bias=bias) if config.gate != "none" else None
        self.out_proj = nn.Linear(config.value_dim, d_model, bias=bias)
        self.decay_proj = None
        if config.decay == "gated":
            self.decay_proj = nn.Linear(d_model, config.num_heads, bias=config.gated_start is not None)
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
        config = self.config
        with torch.no_grad():
            if self.log_rate is not None:
                self.log_rate.copy_((-cast(Tensor, config.log_decay)).log())
            if self.decay_proj is not None and config.gated_start is not None:
                gamma = SCHEDULES[config.gated_start](config.num_heads, dtype=torch.float64).exp()
                self.decay_proj.bias.copy_(torch.logit(gamma ** (1 / (self.GATE_POWER * config.decay_scale))))

    def split_(self, shard: TensorShard) -> None:
        super().split_(shard)
        self.call_retention = replace(self.config.call, split=True)
        self._fixed_log_decay.clear()

    def splits(self) -> Splits:
        config = self.config
        parts, key, value = _parts(config), Part(config.head_key_dim, False), Part(config.head_value_dim, False)
        heads, values = Part(config.num_heads), Part(config.value_dim)
        return {
            **by_rows("q_proj", parts["q"]), **by_rows("k_proj", parts["k"]), **by_rows("v_proj", parts["v"]),
            **by_rows("gate_proj", values), **by_rows("decay_proj", heads), **by_columns("out_proj", config.value_dim),
            **by_rows("conv", *(parts[name] for name in config.conv_on)),
            "q_norm_weight": Split(0, (key,)), "k_norm_weight": Split(0, (key,)), "log_rate": Split(0, (heads,)),
            "head_norm_weight": Split(0, (heads if config.head_norm_affine == "per_head" else value,)),
        }  # fmt: skip

    def state_splits(self) -> Splits:
        parts = _parts(self.config)
        recent = Split(2, tuple(parts[name] for name in self.config.conv_on))
        return {"memory": Split(1, (Part(self.config.num_heads),)), "recent": recent}

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
                log_decay = cast(Tensor, self.config.log_decay).to(device, dtype)
            if transforms_active():  # it belongs to the transform, and cannot be copied after it
                return log_decay
            self._fixed_log_decay[key] = log_decay
        return self._fixed_log_decay[key]

    def gated_log_decay(self, opened: Tensor) -> Tensor:
        """log sigmoid(x W)^(decay_scale / 16) from x W [..., H]."""
        return F.logsigmoid(opened.to(wide_dtype(opened.dtype))) * (self.GATE_POWER * self.config.decay_scale)

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        """Compute rotary angles that layers share, and fixed decays that calls share."""
        prepare_rotation(self.config, layout, self.config.head_key_dim, dtype)
        if self.decay_proj is None and self.log_rate is None:
            self._fixed_log_decay_on(layout.positions.device, wide_dtype(dtype))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> RetentionState:
        """The state of `batch` sequences before their first token."""
        config = self.config
        shape = (batch, config.num_heads, config.head_key_dim, config.head_value_dim)
        memory = torch.zeros(shape, device=device, dtype=wide_dtype(dtype))
        recent = None if self.conv is None else self.conv.init_state(batch, device, dtype)
        return RetentionState(no_tokens(batch, device), memory, recent)

    def forward(
        self, x: Tensor, state: RetentionState | None, layout: TokenLayout
    ) -> tuple[Tensor, RetentionState | RetentionDraft | None]:
        if self.conv is not None and layout.must_pack(state):
            return layout.on_real_tokens(self, x, state)
        config, x = self.config, self.entered(x)
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.qkv_activation != "none":
            projected = F.silu(projected[0]), F.silu(projected[1]), F.silu(projected[2])
        (q, k, v), recent, inputs = self._convolved(projected, state, layout)
        q, k = (z.unflatten(-1, (-1, config.head_key_dim)) for z in (q, k))
        v = v.unflatten(-1, (-1, config.head_value_dim))
        q = normed_heads(q, config.qk_norm, config.qk_norm_eps, self.q_norm_weight)
        k = normed_heads(k, config.qk_norm, config.qk_norm_eps, self.k_norm_weight)
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
            out = GATES[config.gate](self.gate_proj(x)) * out
        out = last_product(self.out_proj, out)
        if layout.deferred:
            return out, RetentionDraft(k, v, log_decay, inputs)
        if memory is None:
            return out, None
        return out, RetentionState.after(state, layout, memory=memory, recent=recent)

    def _convolved(
        self, projected: tuple[Tensor, Tensor, Tensor], state: RetentionState | None, layout: TokenLayout
    ) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
        """q, k and v after the short convolution; what the next call reads; the inputs of a draft."""
        if self.conv is None:
            return projected, None, None
        parts, names = dict(zip("qkv", projected, strict=True)), self.config.conv_on
        inputs = [parts[name] for name in names]
        ys, recent = self.conv.of_parts(inputs, None if state is None else state.recent, layout)
        parts |= zip(names, ys, strict=True)
        return tuple(parts.values()), recent, torch.cat(inputs, -1) if layout.deferred else None

    def _head_norm(self, out: Tensor) -> Tensor:
        """out [B, T, H, V], normed over each head, or over the heads of each group."""
        config = self.config
        if config.head_norm != "none":
            together = out
            if config.head_norm_groups is not None:
                together = out.unflatten(-2, (config.head_norm_groups, -1)).flatten(-2)
            out = normalize(together, config.head_norm, config.head_norm_eps).view(out.shape)
        return out if self.head_norm_weight is None else out * self.head_norm_weight


def _parts(config: RetentionConfig) -> dict[str, Part]:
    """q, k and v as processes divide them: keys and values of a single head are held by all."""
    alone = config.num_kv_heads == 1
    return {name: Part(width, name == "q" or not alone) for name, width in config.projected.items()}


def retention_flops(config: RetentionConfig, work: Workload) -> MixerFlops:
    """The operation of all heads and the taps of the short convolution, without projections."""
    flops, taps = config.call.flops(work), 2 * (config.conv_width or 0) * config.conv_dim
    return MixerFlops(flops.forward + taps, flops.decode + taps)
