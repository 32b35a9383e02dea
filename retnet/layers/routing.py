"""Routing of tokens to experts: scores, preferences, queues of limited length, and balance losses.

    scores       softmax(z), sigmoid(z) or sqrt(softplus(z)) of the router's logits z (the last: DeepSeek-V4)
    preferences  scores + bias, and -inf for experts of groups that the token may not use

Experts are chosen by preference and weighted by score, so that a bias moves tokens between experts and has no other
effect on the output (loss-free balancing, arXiv 2408.15664). Groups of a token: those with the largest sums of the two
best preferences (group-limited top-k, DeepSeek-V3, arXiv 2412.19437).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.layers.token_layout import TokenLayout, documents_of
from retnet.ops.derivatives import transforms_active

Affinity = Literal["softmax", "sigmoid", "sqrt_softplus"]


def affinities(logits: Tensor, kind: Affinity) -> Tensor:
    """The scores [R, E] of logits [R, E]."""
    match kind:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case "sqrt_softplus":
            # Below -80 softplus is no normal number of float32, and the root of 0 has no gradient.
            return F.softplus(logits.clamp_min(-80), threshold=40).sqrt()


def preferences(scores: Tensor, bias: Tensor | None, num_groups: int = 1, top_groups: int = 1) -> Tensor:
    """The order [R, E] in which tokens prefer experts: scores [R, E] plus bias [E], -inf where a token may not go.

    Group g is the experts from g E / num_groups on; a token may use `top_groups` of them. Without gradient.
    """
    preferred = scores.detach()
    if bias is not None:
        preferred = preferred + bias
    if top_groups == num_groups:
        return preferred
    grouped = preferred.unflatten(-1, (num_groups, -1))  # [R, groups, experts of a group]
    value = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    best = value.topk(top_groups, -1).indices
    refused = torch.ones_like(value, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(refused[..., None], -torch.inf).flatten(-2)


def assign(
    preferred: Tensor, top_k: int, room: Tensor, bounds: Tensor, overflow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts [R, top_k] of each token, its place in their queues, and whether there is room for it.

    preferred [R, E] of the tokens of N documents, laid end to end with bounds [N + 1]; every expert has a queue per
    document, with room [N]. Preferences are served rank by rank, and within a rank in the order of tokens. Without
    `overflow` a token tries its top_k experts alone. With it, a token tries the experts in order of preference, those
    of -inf excepted, until top_k had room.
    """
    R, E = preferred.shape
    values, ranked = preferred.detach().sort(dim=-1, descending=True, stable=True)
    document = documents_of(bounds, R)
    room_left = room[:, None].expand(-1, E)  # [N, E]
    found = ranked.new_zeros(R)
    experts = ranked[:, :top_k]
    places, kept = torch.zeros_like(experts), torch.zeros_like(experts, dtype=torch.bool)
    for rank in range(E if overflow else top_k):
        asking = torch.ones_like(found, dtype=torch.bool)
        if overflow:
            asking = (found < top_k) & (values[:, rank] > -torch.inf)
        if not transforms_active() and not bool(asking.any()):
            break
        asked = (ranked[:, rank, None] == torch.arange(E, device=preferred.device)) & asking[:, None]
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


def document_bounds(x: Tensor, layout: TokenLayout | None) -> Tensor:
    """Bounds [N + 1] of the documents of x [B, T, D] (or [T, D]) in its rows laid end to end."""
    if layout is not None and layout.cu_seqlens is not None:
        return layout.cu_seqlens.long()
    rows = x[None] if x.dim() == 2 else x.flatten(0, -3)
    return torch.arange(len(rows) + 1, device=x.device) * rows.shape[1]


def count(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs, [E]; unlike bincount without waiting for a GPU."""
    return (experts[:, None] == torch.arange(num_experts, device=experts.device)).sum(0)


def balance_loss(scores: Tensor, top_k: int) -> Tensor:
    """E sum_e f_e p_e of R tokens from scores [R, E]: a scalar, 1 at balance.

    f is the share of expert e in the top_k scores of all tokens, and p the mean of its scores after they are divided by
    their sum per token (Switch, arXiv 2101.03961).
    """
    E = scores.shape[-1]
    probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
    chosen = scores.topk(top_k, -1).indices
    share = count(chosen.flatten(), E).to(scores.dtype) / chosen.numel()
    return E * (share * probability).sum()


def sequence_balance_loss(scores: Tensor, top_k: int, bounds: Tensor) -> Tensor:
    """`balance_loss` of each of the N documents with bounds [N + 1], as a mean weighted by their tokens: a scalar.

    Complementary sequence-wise auxiliary loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20).
    """
    R, E = scores.shape
    probability = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores, dtype=torch.int32).scatter(-1, scores.topk(top_k, -1).indices, 1)
    total = torch.cat([chosen.new_zeros(1, E), chosen.cumsum(0, dtype=torch.int32)])
    counts = total[bounds[1:]] - total[bounds[:-1]]  # [N, E]
    share = counts.to(scores.dtype) / (top_k * bounds.diff()).clamp_min(1)[:, None]
    return E * (share[documents_of(bounds, R)] * probability).sum() / R
