"""Mixture of experts: a feed-forward in which each token uses `top_k` of `num_experts` experts.

    p = softmax(x W_r) or sigmoid(x W_r)        out = sum over the chosen experts of w_e expert_e(x)

w are the chosen p divided by their sum (Mixtral, arXiv 2401.04088), or the chosen p (Jamba, arXiv 2403.19887). With one
expert per token, w is p itself (Switch, arXiv 2101.03961): a weight of 1 would give the router no gradient. Tokens are
sorted by expert, and each expert reads its own tokens alone.

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

from retnet.layers.feed_forward import ACTIVATIONS
from retnet.layers.linear import WideLinear
from retnet.layers.token_layout import TokenLayout, documents_of
from retnet.layers.weight_roles import WeightRoles
from retnet.ops.derivatives import transforms_active
from retnet.ops.dtypes import wide_dtype
from retnet.ops.grouped_linear import grouped_linear
from retnet.system.choices import check_choices


@dataclass(frozen=True)
class MoEConfig:
    """hidden_dim: of each expert; gated and activation as for `FeedForwardConfig`.

    normalize_weights: the weights of a token's experts are divided by their sum, if it has several.
    capacity_factor: None for no limit. capacity_policy, for tokens beyond an expert's capacity: "overflow" sends them
    to the next-best expert with room, "drop" skips that expert, "pad" drops with shapes that depend on the numbers of
    tokens and documents alone.
    load_balance_coef: of num_experts * sum_e f_e p_e, f the share of choices and p the mean probability of expert e
    (1 at balance). z_loss_coef: of mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906). router_jitter: the router's
    inputs are multiplied by 1 +- jitter in training. router_init_std: of its weights; as other projections if None.
    """

    num_experts: int
    top_k: int
    hidden_dim: int
    gated: bool = True
    activation: Literal["gelu", "relu", "swish"] = "swish"
    bias: bool = False
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = True
    capacity_factor: float | None = None
    capacity_policy: Literal["overflow", "drop", "pad"] = "overflow"
    load_balance_coef: float = 0.01
    z_loss_coef: float = 0.0
    router_jitter: float = 0.0
    router_init_std: float | None = None
    kind: Literal["moe"] = "moe"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.hidden_dim < 1 or self.num_experts < 1:
            raise ValueError(
                f"hidden_dim is {self.hidden_dim}, num_experts {self.num_experts}; accepted: positive integers"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k is {self.top_k}; accepted: 1 to num_experts ({self.num_experts})")
        for name in ("load_balance_coef", "z_loss_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 0 or more")
        for name in ("capacity_factor", "router_init_std"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive number or None")
        if not 0 <= self.router_jitter < 1:
            raise ValueError(f"router_jitter is {self.router_jitter}; accepted: 0 <= jitter < 1")

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


class MoE(nn.Module):
    """x [B, T, D] -> [B, T, D]; its losses go to layout.losses."""

    WEIGHT_ROLES: ClassVar[WeightRoles] = {"gate_proj": "feed_forward", "up_proj": "feed_forward", "down_proj": "down"}

    def __init__(self, config: MoEConfig, d_model: int):
        super().__init__()
        self.config = config
        sizes = (config.num_experts, d_model, config.hidden_dim, config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.router = WideLinear(d_model, config.num_experts, bias=False)
        self.gate_proj = ExpertLinear(*sizes) if config.gated else None
        self.up_proj = ExpertLinear(*sizes)
        self.down_proj = ExpertLinear(config.num_experts, config.hidden_dim, d_model, config.bias)

    def reset_own(self, generator: torch.Generator | None = None) -> None:
        """The router's weights, if the configuration gives their size."""
        if self.config.router_init_std is not None:
            nn.init.normal_(self.router.weight, std=self.config.router_init_std, generator=generator)

    def forward(self, x: Tensor, layout: TokenLayout | None = None) -> Tensor:
        config, losses = self.config, None if layout is None else layout.losses
        if layout is not None and layout.mask is not None and (self.training or losses is not None):
            return layout.on_real_tokens(lambda y, state, dense: (self(y, dense), state), x, None)[0]
        rows = x.flatten(0, -2)
        logits = self._router_logits(rows)
        scores = logits.softmax(-1) if config.router == "softmax" else logits.sigmoid()
        if losses is not None and len(rows):
            losses.append(self.losses(logits, scores))
        kept, seats, num_seats = None, None, 0
        factor = config.capacity_factor if self.training else None
        if factor is None:
            experts = scores.topk(config.top_k, -1).indices
        else:
            bounds = _document_bounds(x, layout)
            lengths = bounds.diff()
            room = (factor * config.top_k * lengths.double() / config.num_experts).ceil().long().minimum(lengths)
            experts, places, kept = assign(scores, config.top_k, room, bounds, config.capacity_policy == "overflow")
            if config.capacity_policy == "pad" or transforms_active():  # which take no shapes that depend on values
                even = factor * config.top_k * len(rows) / config.num_experts
                num_seats = min(len(rows), math.ceil(even) + len(room))  # at least the sum of room
                before = (room.cumsum(0) - room)[documents_of(bounds, len(rows))]
                seats = torch.where(
                    kept, experts * num_seats + before[:, None] + places, config.num_experts * num_seats
                )
        weights = scores.gather(-1, experts)
        if config.normalize_weights and config.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        if kept is not None:
            weights = weights.masked_fill(~kept, 0)
        parts = rows[:, None].expand(-1, config.top_k, -1).flatten(0, 1)
        if seats is None:
            out = self._sorted(parts, experts.flatten(), kept)
        else:
            out = self._seated(parts, seats.flatten(), num_seats)
        out = out.unflatten(0, (-1, config.top_k))
        return (out * weights.to(out.dtype)[..., None]).sum(1).view(x.shape)

    def losses(self, logits: Tensor, scores: Tensor) -> Tensor:
        """The weighted auxiliary losses of R tokens from logits and scores [R, E]: a scalar."""
        config = self.config
        probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
        chosen = scores.topk(config.top_k, -1).indices
        share = _count(chosen.flatten(), config.num_experts) / chosen.numel()
        balance = config.num_experts * (share * probability).sum()
        return config.load_balance_coef * balance + config.z_loss_coef * logits.logsumexp(-1).square().mean()

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
        out = self._experts(parts.index_select(0, order), _count(experts[order], self.config.num_experts))
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


def assign(scores: Tensor, top_k: int, room: Tensor, bounds: Tensor, overflow: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Experts [R, top_k] of each token, its place in their queues, and whether there is room for it.

    scores [R, E] of the tokens of N documents, laid end to end with bounds [N + 1]; every expert has a queue per
    document, with room [N]. Preferences are served rank by rank, and within a rank in the order of tokens. Without
    `overflow` a token tries its top_k experts alone. With it, a token tries the experts in order of preference until
    top_k had room.
    """
    R, E = scores.shape
    ranked = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    document = documents_of(bounds, R)
    room_left = room[:, None].expand(-1, E)  # [N, E]
    found = ranked.new_zeros(R)
    experts = ranked[:, :top_k]
    places, kept = torch.zeros_like(experts), torch.zeros_like(experts, dtype=torch.bool)
    for rank in range(E if overflow else top_k):
        asking = found < top_k if overflow else torch.ones_like(found, dtype=torch.bool)
        if not transforms_active() and not bool(asking.any()):
            break
        asked = (ranked[:, rank, None] == torch.arange(E, device=scores.device)) & asking[:, None]
        total = torch.cat([ranked.new_zeros(1, E), asked.cumsum(0)])
        ahead = total[:-1] - total[bounds[:-1]][document]  # tokens of the document that ask before this one
        left = room_left[document]
        got = (asked & (ahead < left)).any(-1)
        place = ((room[document, None] - left + ahead) * asked).sum(-1)
        column = (found.clamp_max(top_k - 1) if overflow else torch.full_like(found, rank))[:, None]
        experts, places, kept = (
            whole.scatter(1, column, torch.where(got, new, whole.gather(1, column)[:, 0])[:, None])
            for whole, new in ((experts, ranked[:, rank]), (places, place), (kept, got))
        )
        found = found + got
        room_left = (room_left - (total[bounds[1:]] - total[bounds[:-1]])).clamp_min(0)
    return experts, places, kept


def _document_bounds(x: Tensor, layout: TokenLayout | None) -> Tensor:
    """Bounds [N + 1] of the documents of x [B, T, D] (or [T, D]) in its rows laid end to end."""
    if layout is not None and layout.cu_seqlens is not None:
        return layout.cu_seqlens.long()
    rows = x[None] if x.dim() == 2 else x.flatten(0, -3)
    return torch.arange(len(rows) + 1, device=x.device) * rows.shape[1]


def _count(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs, [E]; unlike bincount without waiting for a GPU."""
    return (experts[:, None] == torch.arange(num_experts, device=experts.device)).sum(0)
