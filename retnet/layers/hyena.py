"""Hyena (Poli et al. 2023, arXiv 2302.10866): long convolutions alternating with gates.

    v, x_1, ..., x_n = conv(X W_in)
    z_1 = v        z_{i+1} = x_i * (h_i conv z_i + skip_i * z_i)        out = z_{n+1} W_out

The filter of order i is a small network of the distance in tokens, h_i(t) = exp(-decay t) network(t)_i. It does not
depend on the length of the sequence (the network of the paper sees t / T), so that later tokens never change earlier
outputs.

Decoding is exact, but its state has no fixed size: each token reads the inputs of all earlier tokens, so cost per token
and state grow with the length of the sequence. Packed documents are convolved one by one.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retnet.layers.growth import Growths
from retnet.layers.linear import WideLinear, is_plain_linear
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule, Workload
from retnet.layers.recompute import last_product
from retnet.layers.short_convolution import ShortConvolution
from retnet.layers.state import TokenCache, no_tokens
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightParts, WeightRoles
from retnet.ops.derivatives import transforms_active
from retnet.ops.dtypes import wide_dtype
from retnet.ops.long_convolution import long_convolution, past_convolution
from retnet.ops.ragged import equal_blocks


@dataclass(frozen=True)
class HyenaConfig(MixerConfig):
    """order: number of gated long convolutions. filter_hidden: width of the filter network. filter_decay: rate per
    token of the exponential window on filters (0: no window). conv_width: tokens that the short convolution sees.
    """

    refused_by_engine = "the cost of each token grows with the number of tokens before it"
    refused_on_shards = "its convolution is as long as the row"
    refused_when_split = "its filters are one network over all channels"

    order: int = 2
    filter_hidden: int = 64
    filter_decay: float = 0.0
    conv_width: int = 3
    kind: Literal["hyena"] = "hyena"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("order", "filter_hidden", "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive integer")
        if not 0 <= self.filter_decay < math.inf:
            raise ValueError(f"filter_decay is {self.filter_decay}; accepted: 0 or more")

    @property
    def kept_tokens(self) -> float:
        return math.inf


class FilterNetwork(nn.Module):
    """Filters [L, channels] as functions of the distance in tokens: sines, two hidden layers with sine, a window.

    Wavelengths run in octaves from 2 to 2^BANDS tokens, for every length.
    """

    BANDS = 16
    GROWTH: ClassVar[Growths] = {"filter_in": "fixed", "filter_hidden": "fixed", "filter_out": "input"}

    def __init__(self, hidden_dim: int, channels: int, decay: float):
        super().__init__()
        self.decay = decay
        self.filter_in = WideLinear(2 * self.BANDS, hidden_dim)
        self.filter_hidden = WideLinear(hidden_dim, hidden_dim)
        self.filter_out = WideLinear(hidden_dim, channels, bias=False)
        # In inference, filters of plain layers depend on the weights alone, and are kept until one changes.
        self._kept: tuple[Tensor, Tensor] | None = None
        self.reset_own()

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Arguments of the sines near 1; filters whose sum over a thousand tokens is about that of the skip."""
        width = self.filter_out.in_features
        for layer, std in (
            (self.filter_in, self.BANDS**-0.5),
            (self.filter_hidden, (2 / width) ** 0.5),
            (self.filter_out, (2 / width) ** 0.5 / 32),
        ):
            nn.init.normal_(layer.weight, std=std, generator=generator)

    def forward(self, length: int, device: torch.device | None = None) -> Tensor:
        """[length, channels] in float32 (float64 for float64)."""
        layers = self.filter_in, self.filter_hidden, self.filter_out
        if torch.is_grad_enabled() or transforms_active() or not all(map(is_plain_linear, layers)):
            return self._filters(length, device)
        # Compared by value: a merged adapter leaves neither another tensor nor another version.
        weights = torch.cat([p.detach().flatten() for p in self.parameters()])
        if self._kept is None or len(self._kept[1]) < length or not _equal(self._kept[0], weights):
            self._kept = (weights, self._filters(length + length // 2, device))
        return self._kept[1][:length]

    def _filters(self, length: int, device: torch.device | None) -> Tensor:
        distance = torch.arange(length, dtype=torch.float64, device=device)[:, None]
        angle = distance * (2 * math.pi / 2.0 ** torch.arange(1, self.BANDS + 1, device=device))
        x = torch.cat([angle.sin(), angle.cos()], -1).to(wide_dtype(self.filter_in.weight.dtype))
        x = self.filter_hidden(self.filter_in(x).sin()).sin()
        filters = self.filter_out(x)
        return filters * (-self.decay * distance).exp().to(filters.dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass
class HyenaState(TokenCache):
    """inputs [N, capacity, order, D] of the long convolutions, all of them; recent [N, W - 1, C] of the short one."""

    PER_TOKEN = ("inputs",)

    inputs: Tensor
    recent: Tensor


class Hyena(MixerModule):
    """x [B, T, D] -> y [B, T, D], the inputs of all its convolutions."""

    WEIGHT_ROLES: ClassVar[WeightRoles] = {"in_proj": "value", "out_proj": "output"}

    def __init__(self, config: HyenaConfig, d_model: int):
        super().__init__()
        self.config = config
        channels = (config.order + 1) * d_model
        self.in_proj = nn.Linear(d_model, channels)
        self.conv = ShortConvolution(channels, config.conv_width)
        self.filters = FilterNetwork(config.filter_hidden, config.order * d_model, config.filter_decay)
        self.skip = nn.Parameter(torch.ones(config.order, d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """Skips of 1."""
        nn.init.ones_(self.skip)

    def weight_parts(self) -> WeightParts:
        return {"in_proj": (self.out_proj.in_features,) * (self.config.order + 1)}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0) -> HyenaState:
        """The state of `batch` sequences before their first token, with room for `num_tokens` each."""
        inputs = torch.zeros(batch, num_tokens, *self.skip.shape, device=device, dtype=dtype)
        return HyenaState(no_tokens(batch, device), inputs, self.conv.init_state(batch, device, dtype), filled=0)

    def forward(self, x: Tensor, state: HyenaState | None, layout: TokenLayout) -> tuple[Tensor, HyenaState | None]:
        if layout.must_pack(state):
            return layout.on_real_tokens(self, x, state)
        u, recent = self.conv(self.in_proj(x), None if state is None else state.recent, layout)
        u = u.unflatten(-1, (-1, x.shape[2]))
        longest = x.shape[1] + (0 if state is None else state.inputs.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            filters = self.filters(longest, x.device)
        outs, inputs = [u[:, :0, 0]], [u[:, :0, 1:]]
        for rows, tokens, sequences in equal_blocks(x.shape[0], x.shape[1], layout.bounds):
            before = None
            if state is not None:
                past = state.inputs[sequences].flatten(2)
                before = past_convolution(past, state.position[sequences], filters, tokens.stop - tokens.start)
            z, z_all = self._gated_convolutions(u[rows, tokens], filters, before)
            outs.append(z)
            inputs.append(z_all)
        if layout.carry:
            state = HyenaState.append(state, {"inputs": torch.cat(inputs, 1)}, layout, recent=recent)
        return last_product(self.out_proj, torch.cat(outs, 1)), state if layout.carry else None

    def _gated_convolutions(self, u: Tensor, filters: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """u [B, T, order + 1, D] -> (z [B, T, D], the inputs of the convolutions [B, T, order, D])."""
        z, *gates = u.unbind(2)
        filters = filters.unflatten(-1, self.skip.shape)
        inputs = []
        for i, gate in enumerate(gates):
            inputs.append(z)
            y = long_convolution(z, filters[:, i])
            if before is not None:
                y = y + before.unflatten(-1, self.skip.shape)[:, :, i]
            z = gate * (y.to(z.dtype) + self.skip[i] * z)
        return z, torch.stack(inputs, 2)


def hyena_flops(config: HyenaConfig, work: Workload) -> MixerFlops:
    """`order` long convolutions of every channel, and a short one.

    Over a sequence of T tokens, a long convolution is three Fourier transforms of 2 T points (2.5 n log2 n operations
    each); for a new token, a dot product with the whole past. Filters are made once for all sequences and not counted.
    """
    long = config.order * work.d_model
    taps = 2 * config.conv_width * (config.order + 1) * work.d_model
    return MixerFlops(long * 15 * math.log2(2 * work.context) + taps, 2 * long * work.context + taps)
