"""Mixture of experts: a feed-forward in which each token uses `top_k` of `num_experts` experts.

    out = shared(x) + routed_scale * sum over the chosen experts of w_e expert_e(x)

`routing.py` computes scores from x W_r and says which experts a token chooses. w are their scores divided by their sum
(Mixtral, arXiv 2401.04088), or their scores (Jamba, arXiv 2403.19887). With one expert per token, w is the score itself
(Switch, arXiv 2101.03961): a weight of 1 would give the router no gradient. Tokens are sorted by expert, and each
expert reads its own tokens alone. The shared experts (DeepSeekMoE, arXiv 2401.06066) read every token.

In training, each expert takes at most capacity_factor * top_k * tokens / num_experts tokens, rounded up, of each
document: a row, or a part of a packed row. First choices are served before second ones, and earlier tokens before later
ones. So the result for a token depends on its document alone, whatever the batch and the number of processes. In
evaluation there is no limit: it depends on the token alone, up to the rounding of products whose sizes vary.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retnet.layers.feed_forward import ACTIVATIONS, FeedForward, FeedForwardConfig
from retnet.layers.float32_parameters import Float32Parameters
from retnet.layers.growth import Growths
from retnet.layers.linear import WideLinear
from retnet.layers.routing import (
    Affinity,
    affinities,
    assign,
    balance_loss,
    count,
    document_bounds,
    preferences,
    sequence_balance_loss,
)
from retnet.layers.token_layout import TokenLayout, documents_of
from retnet.layers.weight_roles import WeightRoles
from retnet.ops.derivatives import transforms_active
from retnet.ops.dtypes import wide_dtype
from retnet.ops.grouped_linear import grouped_linear
from retnet.system.choices import check_choices


@dataclass(frozen=True)
class MoEConfig:
    """hidden_dim: of each expert; gated and activation as for `FeedForwardConfig`.

    router: the scores' function of the logits. normalize_weights: the weights of a token's experts are divided by their
    sum, if it has several. routed_scale: of the sum of the chosen experts. shared_hidden_dim: of one feed-forward that
    every token uses as well; N shared experts are one of N times their width.
    num_groups, top_groups: experts are divided into groups, and a token uses those of top_groups of them.
    bias_update_rate: the scores get a bias for the choice of experts, which each step of training moves by this
    against the load (`routing_bias.py`); None for none. bias_tolerance: experts whose load differs from the mean by at
    most this share of it keep their bias.
    capacity_factor: None for no limit. capacity_policy, for tokens beyond an expert's capacity: "overflow" sends them
    to the next-best expert with room, "drop" skips that expert, "pad" drops with shapes that depend on the numbers of
    tokens and documents alone.
    load_balance_coef, sequence_balance_coef: of `balance_loss` over all tokens and `sequence_balance_loss`.
    z_loss_coef: of mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906). router_jitter: the router's
    inputs are multiplied by 1 +- jitter in training. router_init_std: of its weights; as other projections if None.
    """

    num_experts: int
    top_k: int
    hidden_dim: int
    gated: bool = True
    activation: Literal["gelu", "relu", "swish"] = "swish"
    bias: bool = False
    router: Affinity = "softmax"
    normalize_weights: bool = True
    routed_scale: float = 1.0
    shared_hidden_dim: int | None = None
    num_groups: int = 1
    top_groups: int = 1
    bias_update_rate: float | None = None
    bias_tolerance: float = 0.0
    capacity_factor: float | None = None
    capacity_policy: Literal["overflow", "drop", "pad"] = "overflow"
    load_balance_coef: float = 0.01
    sequence_balance_coef: float = 0.0
    z_loss_coef: float = 0.0
    router_jitter: float = 0.0
    router_init_std: float | None = None
    kind: Literal["moe"] = "moe"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("hidden_dim", "num_experts", "num_groups", "shared_hidden_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive integer")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k is {self.top_k}; accepted: 1 to num_experts ({self.num_experts})")
        for name in ("load_balance_coef", "sequence_balance_coef", "z_loss_coef", "bias_tolerance", "bias_update_rate"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 0 or more")
        for name in ("capacity_factor", "router_init_std", "routed_scale"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive number")
        if not 0 <= self.router_jitter < 1:
            raise ValueError(f"router_jitter is {self.router_jitter}; accepted: 0 <= jitter < 1")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups is {self.num_groups} of {self.num_experts} experts; accepted: a divisor")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups is {self.top_groups}; accepted: 1 to num_groups ({self.num_groups})")
        size = self.num_experts // self.num_groups
        if self.top_k > self.top_groups * size:
            raise ValueError(
                f"top_k is {self.top_k} with {self.top_groups} groups of {size} experts; accepted: at most "
                f"{self.top_groups * size}"
            )

    @property
    def shared(self) -> FeedForwardConfig | None:
        """The feed-forward that every token uses."""
        if self.shared_hidden_dim is None:
            return None
        return FeedForwardConfig(self.shared_hidden_dim, self.gated, self.activation, self.bias)

    def idle_parameters(self, d_model: int) -> int:
        """Weights that a token does not use: those of the experts not chosen for it."""
        ups = 2 if self.gated else 1
        expert = (ups + 1) * d_model * self.hidden_dim
        if self.bias:
            expert += ups * self.hidden_dim + d_model
        return (self.num_experts - self.top_k) * expert


class ExpertLinear(nn.Module):
    """One linear map per expert: weight [E, out, in], bias [E, out]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)

    def forward(self, x: Tensor, counts: Tensor | None) -> Tensor:
        """x [R, in] sorted by expert, counts [E] rows of each; or x [E, C, in] without counts."""
        if counts is not None:
            return grouped_linear(x, self.weight, self.bias, counts)
        out = torch.bmm(x, self.weight.transpose(1, 2))
        return out if self.bias is None else out + self.bias[:, None]


class MoE(Float32Parameters):
    """x [B, T, D] -> [B, T, D]; its losses go to layout.losses.

    routing_bias [E] (float32, or wider) is a buffer: `routing_bias.py` moves it after a step by the loads that forwards
    of training counted. A forward that activation checkpointing repeats is counted again, which keeps their ratios.
    """

    FLOAT32_PARAMETERS = ("routing_bias",)
    routing_bias: Tensor | None
    WEIGHT_ROLES: ClassVar[WeightRoles] = {"gate_proj": "feed_forward", "up_proj": "feed_forward", "down_proj": "down"}
    GROWTH: ClassVar[Growths] = {"router": "readout"}

    def __init__(self, config: MoEConfig, d_model: int):
        super().__init__()
        self.config = config
        sizes = (config.num_experts, d_model, config.hidden_dim, config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.router = WideLinear(d_model, config.num_experts, bias=False)
        has_bias = config.bias_update_rate is not None
        self.register_buffer("routing_bias", torch.zeros(config.num_experts) if has_bias else None)
        self.gate_proj = ExpertLinear(*sizes) if config.gated else None
        self.up_proj = ExpertLinear(*sizes)
        self.down_proj = ExpertLinear(config.num_experts, config.hidden_dim, d_model, config.bias)
        self.shared = None if config.shared is None else FeedForward(config.shared, d_model)
        # Not a buffer: DistributedDataParallel would replace it by that of the first process.
        self._load: Tensor | None = None

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """The router's weights, if the configuration gives their size, and its bias."""
        if self.config.router_init_std is not None:
            nn.init.normal_(self.router.weight, std=self.config.router_init_std, generator=generator)
        if self.routing_bias is not None:
            nn.init.zeros_(self.routing_bias)

    def take_load(self) -> Tensor:
        """How often forwards of training have chosen each expert [E] since the last call."""
        load, self._load = self._load, None
        if load is None:
            load = torch.zeros(self.config.num_experts, dtype=torch.long, device=self.router.weight.device)
        return load

    def forward(self, x: Tensor, layout: TokenLayout | None = None) -> Tensor:
        losses = None if layout is None else layout.losses
        if layout is not None and layout.mask is not None and (self.training or losses is not None):
            return layout.on_real_tokens(lambda y, state, dense: (self(y, dense), state), x, None)[0]
        rows = x.flatten(0, -2)
        logits = self._router_logits(rows)
        scores = affinities(logits, self.config.router)
        if losses is not None and len(rows):
            losses.append(self.losses(logits, scores, document_bounds(x, layout)))
        out = self._routed(rows, scores, x, layout).view(x.shape)
        return out if self.shared is None else out + self.shared(x)

    def losses(self, logits: Tensor, scores: Tensor, bounds: Tensor) -> Tensor:
        """The weighted losses of R tokens from logits and scores [R, E] and bounds of documents [N + 1]: a scalar."""
        config = self.config
        loss = config.load_balance_coef * balance_loss(scores, config.top_k)
        if config.sequence_balance_coef:
            loss = loss + config.sequence_balance_coef * sequence_balance_loss(scores, config.top_k, bounds)
        return loss + config.z_loss_coef * logits.logsumexp(-1).square().mean()

    def _routed(self, rows: Tensor, scores: Tensor, x: Tensor, layout: TokenLayout | None) -> Tensor:
        """The weighted sum [R, D] of the experts chosen for the rows [R, D] of x."""
        config = self.config
        preferred = preferences(scores, self.routing_bias, config.num_groups, config.top_groups)
        experts = preferred.topk(config.top_k, -1).indices
        self._count(experts)
        kept, seats, num_seats = None, None, 0
        factor = config.capacity_factor if self.training else None
        if factor is not None:
            bounds = document_bounds(x, layout)
            lengths = bounds.diff()
            room = (factor * config.top_k * lengths.double() / config.num_experts).ceil().long().minimum(lengths)
            experts, places, kept = assign(preferred, config.top_k, room, bounds, config.capacity_policy == "overflow")
            if config.capacity_policy == "pad" or transforms_active():  # which take no shapes that depend on values
                even = factor * config.top_k * len(rows) / config.num_experts
                num_seats = min(len(rows), math.ceil(even) + len(room))  # at least the sum of room
                before = (room.cumsum(0) - room)[documents_of(bounds, len(rows))]
                seats = torch.where(
                    kept, experts * num_seats + before[:, None] + places, config.num_experts * num_seats
                )
        parts = rows[:, None].expand(-1, config.top_k, -1).flatten(0, 1)
        if seats is None:
            out = self._sorted(parts, experts.flatten(), kept)
        else:
            out = self._seated(parts, seats.flatten(), num_seats)
        out = out.unflatten(0, (-1, config.top_k))
        return (out * self._weights(scores, experts, kept).to(out.dtype)[..., None]).sum(1)

    def _weights(self, scores: Tensor, experts: Tensor, kept: Tensor | None) -> Tensor:
        """The weights [R, top_k] of the chosen experts, 0 for those without room."""
        config = self.config
        weights = scores.gather(-1, experts)
        if config.normalize_weights and config.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        if config.routed_scale != 1.0:
            weights = config.routed_scale * weights
        return weights if kept is None else weights.masked_fill(~kept, 0)

    def _count(self, experts: Tensor) -> None:
        """Add the choices of a step of training to the load. Transforms of torch.func are not counted."""
        if self.routing_bias is None or not (self.training and torch.is_grad_enabled()) or transforms_active():
            return
        load = count(experts.flatten(), self.config.num_experts)
        self._load = load if self._load is None else self._load + load

    def _router_logits(self, rows: Tensor) -> Tensor:
        """[R, E] in float32 or wider: rounding must not decide the choice of experts."""
        wide = rows.to(wide_dtype(rows.dtype))
        if self.training and self.config.router_jitter:
            wide = wide * (1 + self.config.router_jitter * (2 * torch.rand_like(wide) - 1))
        return self.router(wide)

    def _sorted(self, parts: Tensor, experts: Tensor, kept: Tensor | None) -> Tensor:
        """Each expert on its rows [P, D] of `parts`, in contiguous runs; 0 for those not kept."""
        pairs = torch.arange(len(parts), device=parts.device) if kept is None else kept.flatten().nonzero()[:, 0]
        order = pairs[experts[pairs].sort(stable=True).indices]
        out = self._experts(parts.index_select(0, order), count(experts[order], self.config.num_experts))
        # A permutation, not an index_add: sums in one order, whatever the device.
        return out.new_zeros(parts.shape).index_copy(0, order, out)

    def _seated(self, parts: Tensor, seats: Tensor, num_seats: int) -> Tensor:
        """Each expert on `num_seats` rows, whatever the router chooses; tokens without room share an extra row."""
        E, D = self.config.num_experts, parts.shape[1]
        rows = parts.new_zeros(E * num_seats + 1, D).index_copy(0, seats, parts)[:-1]
        out = self._experts(rows.unflatten(0, (E, -1)), None).flatten(0, 1)
        return torch.cat([out, out.new_zeros(1, D)]).index_select(0, seats)

    def _experts(self, x: Tensor, counts: Tensor | None) -> Tensor:
        hidden = self.up_proj(x, counts)
        if self.gate_proj is None:
            return self.down_proj(self.activation(hidden), counts)
        return self.down_proj(self.activation(self.gate_proj(x, counts)) * hidden, counts)
