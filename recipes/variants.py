"""Experimental forms of retention, each as other inputs of the same operator: a mixer named "retention-variant".

    signed     S_t = s_t a_t S_{t-1} + k_t^T v_t                                        s_t = tanh(x W + b)
    rotated    S_t = a_t U(step_t f) S_{t-1} + k_t^T v_t                                step_t = pi tanh(x W + b)
    two_tap    S_t = a_t (S_{t-1} + (1 - l_t) k_{t-1}^T v_{t-1}) + l_t k_t^T v_t         l_t = sigmoid(x W + b)
    canon      x <- x + convolution(x) on the mixer's input

Signs (arXiv 2411.12537) and rotations (Mamba-3, arXiv 2603.15569) are products over tokens, so their running products
are folded into q and k, like rotary positions that depend on the text; |s_t| multiplies the decay. The gradient with
respect to s_t passes through |s_t|, and the sign changes where that is smallest. The two-tap write is Mamba-3's
trapezoidal rule with a step of one: a token's weight becomes l_t + 1 - l_{t+1}, and what it has received too early from
the next token is taken back from its own output, so that one call without shifted copies of k and v is enough. Canon
layers are of arXiv 2512.17351.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet import ModelConfig
from retnet.layers.mixer_base import MixerFlops, Workload
from retnet.layers.mixers import MIXERS, Mixer, register
from retnet.layers.norm import normed_heads
from retnet.layers.retention import GATES, MultiScaleRetention, RetentionConfig, RetentionState, retention_flops
from retnet.layers.rotary import rotate_heads
from retnet.layers.short_convolution import ShortConvolution
from retnet.layers.state import no_tokens
from retnet.layers.token_layout import TokenLayout
from retnet.ops.decay import decay_norm
from retnet.ops.dtypes import wide_dtype
from retnet.ops.rotary import frequencies, rotate

KIND = "retention-variant"
SMALLEST_SIGN = 2.0**-7  # of |s_t|: the gradient of log |s| is 1 / s, which multiplies the rounding errors of the sums


@dataclass(frozen=True)
class VariantConfig(RetentionConfig):
    """Retention with any of the forms above. canon: width of the convolution on the input; canon_activation follows."""

    signed: bool = False
    rotated: bool = False
    two_tap: bool = False
    canon: int | None = None
    canon_activation: Literal["silu", "none"] = "none"
    sign_start: float = 2.0  # tanh(2) = 0.964: a window like that of a gated head at its start
    kind: Literal["retention-variant"] = KIND  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotated and self.head_key_dim % 2:
            raise ValueError(f"rotated turns pairs, but heads have {self.head_key_dim} keys; accepted: an even number")
        if self.decay_norm and self.signed:
            raise ValueError("decay_norm is defined for a decay fixed per head; accepted with signed: false")

    @property
    def call(self):
        return replace(super().call, per_token=self.signed or self.decay == "gated")

    def for_export(self, one_token: bool) -> None:
        return None


@dataclass
class VariantState(RetentionState):
    """flips [N, H] negative signs so far, modulo 2; angle [N, H] sum of the rotation's steps, both float64.

    With the two-tap write, memory lacks the last token's write: last_k [N, H, K], last_v [N, H, V] and its weight
    last_weight [N, H] are kept apart. canon [N, W - 1, D]: inputs of the convolution on the mixer's input.
    """

    flips: Tensor | None = None
    angle: Tensor | None = None
    last_k: Tensor | None = None
    last_v: Tensor | None = None
    last_weight: Tensor | None = None
    canon: Tensor | None = None


class TokenValue(nn.Module):
    """x W + b [B, T, H] in float32 (float64 for float64), without weight decay like the weights of decays."""

    def __init__(self, d_model: int, num_heads: int, start: float):
        super().__init__()
        self.start = start
        self.weight, self.bias = nn.Parameter(torch.empty(num_heads, d_model)), nn.Parameter(torch.empty(num_heads))
        self.reset_own()

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a rounded angle adds up over the tokens
            wide = wide_dtype(x.dtype)
            return F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))


class VariantRetention(MultiScaleRetention):
    """x [B, T, D] -> y [B, T, D], state of `VariantState`."""

    config: VariantConfig

    def __init__(self, config: VariantConfig, d_model: int):
        super().__init__(config, d_model)
        H = config.num_heads
        self.sign = TokenValue(d_model, H, config.sign_start) if config.signed else None
        self.step = TokenValue(d_model, H, 0.0) if config.rotated else None
        self.tap = TokenValue(d_model, H, 0.0) if config.two_tap else None
        self.canon = None
        if config.canon is not None:
            self.canon = ShortConvolution(d_model, config.canon, False, config.canon_activation)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> VariantState:
        config, wide = self.config, wide_dtype(dtype)
        plain = super().init_state(batch, device, dtype, num_tokens)
        H, K, V = config.num_heads, config.head_key_dim, config.head_value_dim

        def zeros(wanted: bool, *shape: int, dtype: torch.dtype) -> Tensor | None:
            return torch.zeros(batch, *shape, device=device, dtype=dtype) if wanted else None

        return VariantState(
            no_tokens(batch, device),
            plain.memory,
            plain.recent,
            zeros(config.signed, H, dtype=torch.float64),
            zeros(config.rotated, H, dtype=torch.float64),
            zeros(config.two_tap, H, K, dtype=wide),
            zeros(config.two_tap, H, V, dtype=wide),
            zeros(config.two_tap, H, dtype=wide),
            None if self.canon is None else self.canon.init_state(batch, device, dtype),
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: VariantState | None, layout: TokenLayout
    ) -> tuple[Tensor, VariantState | None]:
        if layout.must_pack(state):
            return layout.on_real_tokens(self, x, state)
        if layout.deferred:
            raise NotImplementedError("variants of retention have no drafts")
        config, before = self.config, {} if state is None else state.tensors()
        after: dict[str, Tensor | None] = {}
        if self.canon is not None:
            y, after["canon"] = self.canon(x, before.get("canon"), layout)
            x = x + y
        q, k, v, after["recent"] = self._heads(x, before.get("recent"), layout)
        log_decay, memory = self.log_decay(x), before.get("memory")
        if self.sign is not None:
            q, k, shrunk, after["flips"] = fold_signs(q, k, self.sign(x), before.get("flips"), layout)
            log_decay = log_decay + shrunk
        if self.step is not None:
            step = torch.pi * self.step(x).tanh()
            q, k, after["angle"] = self._fold_rotation(q, k, step, before.get("angle"), layout)
        k_written, own = k, None
        if self.tap is not None:
            weight = self.tap(x).sigmoid()
            written, memory, last = two_taps(k, v, weight, before, layout)
            after |= last
            k_written = k * written[..., None].to(k.dtype)
            own = (weight - written)[..., None] * (q * k).sum(-1, keepdim=True) * config.head_key_dim**-0.5
        out, after["memory"] = self.call_retention(q, k_written, v, log_decay, memory, layout)
        if own is not None:
            out = out + own.to(out.dtype) * v
        out = self._output(x, out, log_decay, layout)
        if after["memory"] is None:
            return out, None
        if state is not None and layout.in_place and layout.one_per_row:
            for name, new in after.items():
                if new is not None and new is not before[name]:
                    before[name].copy_(new)
            after = dict(before)
            del after["position"]
        return out, VariantState.after(state, layout, **after)

    def _heads(
        self, x: Tensor, recent: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k [B, T, H, K] and v [B, T, H, V] as the operator of plain retention reads them, and `recent`."""
        config = self.config
        parts = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        if self.conv is not None:
            ys, recent = self.conv.of_parts([parts[part] for part in config.conv_on], recent, layout)
            parts |= dict(zip(config.conv_on, ys, strict=True))
        q, k = (parts[part].unflatten(-1, (-1, config.head_key_dim)) for part in "qk")
        v = parts["v"].unflatten(-1, (-1, config.head_value_dim))
        q = normed_heads(q, config.qk_norm, config.qk_norm_eps, self.q_norm_weight)
        k = normed_heads(k, config.qk_norm, config.qk_norm_eps, self.k_norm_weight)
        q, k = rotate_heads(config, layout, q, k)
        if config.heads_per_kv_head > 1:
            k, v = (z.repeat_interleave(config.heads_per_kv_head, 2) for z in (k, v))
        return q, k, v, recent

    def _fold_rotation(
        self, q: Tensor, k: Tensor, step: Tensor, before: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q and k turned by their running angles, whose sums are float64: a long text makes them large."""
        config = self.config
        rotary = "half" if config.rotary == "half" else "interleaved"
        angle, after = running_sum(real(step.double(), layout), before, layout)
        turns = frequencies(rotary, config.head_key_dim, config.rotary_base, dtype=torch.float64, device=q.device)
        pairs = (angle[..., None] * turns).remainder(2 * torch.pi).to(step.dtype)
        cos, sin = pairs.cos().flatten(1, 2), pairs.sin().flatten(1, 2)
        # One token per head: the heads have angles of their own.
        q, k = (rotate(z.flatten(1, 2)[:, :, None], cos, sin, rotary)[:, :, 0].view_as(z) for z in (q, k))
        return q, k, after

    def _output(self, x: Tensor, out: Tensor, log_decay: Tensor, layout: TokenLayout) -> Tensor:
        config = self.config
        if config.decay_norm:
            out = out / decay_norm(log_decay, layout.positions)[..., None].to(out.dtype)
        out = self._head_norm(out).flatten(-2).to(x.dtype)
        if self.gate_proj is not None:
            out = GATES[config.gate](self.gate_proj(x)) * out
        return self.out_proj(out)


def fold_signs(
    q: Tensor, k: Tensor, opened: Tensor, before: Tensor | None, layout: TokenLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, log |s| [B, T, H], flips after) for s = tanh(opened [B, T, H]) bounded away from 0."""
    size = opened.abs().clamp_min(SMALLEST_SIGN)
    shrunk = torch.log(-torch.expm1(-2 * size)) - torch.log1p(torch.exp(-2 * size))
    flips, after = running_sum(real((opened < 0).double(), layout), before, layout)
    sign = (1 - 2 * flips.remainder(2)).to(q.dtype)[..., None]
    return q * sign, k * sign, shrunk, after.remainder(2)


def two_taps(
    k: Tensor, v: Tensor, weight: Tensor, before: dict[str, Tensor], layout: TokenLayout
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """What each token writes [B, T, H], 0 at the end of a sequence, the memory with the last call's last token, and
    this call's last tokens."""
    wide = weight.dtype
    following = torch.cat([weight[:, 1:], torch.zeros_like(weight[:, :1])], 1)
    written, first, last = weight + 1 - following, *_ends(layout)
    rows, first_rows, last_rows = _rows(layout, first), first, last
    written = written.index_put((rows, last_rows), torch.zeros((), dtype=wide, device=weight.device))
    seen = layout.lengths > 0
    memory = before.get("memory")
    if memory is not None:
        late = (before["last_weight"] + 1 - weight[rows, first_rows]) * seen[:, None]
        write = (late[..., None] * before["last_k"])[..., None] * before["last_v"][..., None, :]
        write = write.to(memory.dtype)
        memory = memory.add_(write) if layout.in_place and layout.one_per_row else memory + write
    lasts = {"last_k": k[rows, last_rows], "last_v": v[rows, last_rows], "last_weight": weight[rows, last_rows]}
    for name, new in lasts.items():
        old = before.get(name)
        shape = (-1, *[1] * (new.dim() - 1))
        kept = torch.zeros_like(new, dtype=wide) if old is None else old
        lasts[name] = torch.where(seen.view(shape), new.to(wide), kept)
    return written, memory, lasts


def _ends(layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """The places [N] in their rows of the first and the last token of each sequence."""
    T = layout.positions.shape[1]
    if layout.cu_seqlens is None:
        first = torch.zeros_like(layout.lengths)
        return first, first + (T - 1)
    bounds = layout.cu_seqlens.long()
    return bounds[:-1].clamp_max(T - 1), (bounds[1:] - 1).clamp_min(0)


def _rows(layout: TokenLayout, places: Tensor) -> Tensor:
    return (
        torch.zeros_like(places) if layout.cu_seqlens is not None else torch.arange(len(places), device=places.device)
    )


def real(values: Tensor, layout: TokenLayout) -> Tensor:
    """0 at the masked tokens of a decode step."""
    return values if layout.mask is None else values * layout.mask[..., None]


def running_sum(values: Tensor, before: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Sums [B, T, H] up to each token of its sequence, after `before` [N, H], and the sums after the last tokens."""
    total = F.pad(values, (0, 0, 1, 0)).cumsum(1)
    if layout.cu_seqlens is None:
        start = 0 if before is None else before
        sums = total[:, 1:] if before is None else total[:, 1:] + before[:, None]
        return sums, total[:, -1] + start
    bounds = layout.cu_seqlens.long()
    start = -total[0, bounds[:-1]] if before is None else before - total[0, bounds[:-1]]
    return total[:, 1:] + start[layout.sequences[0]], total[0, bounds[1:]] + start


def variant_flops(config: VariantConfig, work: Workload) -> MixerFlops:
    """Retention's, and what the variants add per token; the two-tap write's decode step writes the memory twice."""
    flops, H, K, V = retention_flops(config, work), config.num_heads, config.head_key_dim, config.head_value_dim
    per_head = 4 * K * config.signed + 12 * K * config.rotated + (4 * K + 2 * V) * config.two_tap
    added = H * per_head + 2 * (config.canon or 0) * work.d_model
    return MixerFlops(flops.forward + added, flops.decode + added + 2 * H * K * V * config.two_tap)


def with_variant(config: ModelConfig, **values) -> ModelConfig:
    """The stack with these values in all its retention layers. Raises ValueError if there are none."""

    def change(mixer):
        if not isinstance(mixer, RetentionConfig):
            return mixer
        if isinstance(mixer, VariantConfig):
            return replace(mixer, **values)
        kept = {f.name: getattr(mixer, f.name) for f in fields(mixer) if f.name != "kind"}
        return VariantConfig(**kept | values)

    return _with_mixers(config, [change(layer.mixer) for layer in config.layers])


def alibi_decay(num_heads: int, scale: float = 1.0) -> tuple[float, ...]:
    """Gammas exp(-scale 2^(-8 h / H)), h = 1 .. H: the slopes of ALiBi (arXiv 2108.12409) as decays."""
    slopes = torch.exp2(-8 * torch.arange(1, num_heads + 1, dtype=torch.float64) / num_heads)
    return tuple(torch.exp(-scale * slopes).tolist())


def with_decay_list(config: ModelConfig, *, by_layer: bool) -> ModelConfig:
    """ALiBi's slopes in all retention layers; by_layer: times 1 - l / (L - 1) + 1e-5, so that later layers see further.

    Layer-scaled slopes are those of lightning attention (arXiv 2401.04658). Raises ValueError for gated decays.
    """
    L = len(config.layers)
    mixers = []
    for index, layer in enumerate(config.layers):
        mixer = layer.mixer
        if isinstance(mixer, RetentionConfig):
            if mixer.decay == "gated":
                raise ValueError("decay is 'gated'; accepted with a list of decays: a decay fixed per head")
            scale = 1 - index / max(1, L - 1) + 1e-5 if by_layer else 1.0
            mixer = replace(mixer, decay=alibi_decay(mixer.num_heads, scale))
        mixers.append(mixer)
    return _with_mixers(config, mixers)


def _with_mixers(config: ModelConfig, mixers: list) -> ModelConfig:
    if not any(isinstance(mixer, RetentionConfig) for mixer in mixers):
        raise ValueError("the stack has no retention layer; accepted: a stack with one")
    layers = tuple(replace(layer, mixer=mixer) for layer, mixer in zip(config.layers, mixers, strict=True))
    return replace(config, layers=layers)


if KIND not in MIXERS:
    register(Mixer(KIND, VariantConfig, cast(type, VariantRetention), VariantState, None, variant_flops))
