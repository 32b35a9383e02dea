"""Softmax attention of few queries to many keys, whose keys are cut into parts that a GPU reads side by side.

    m_p, l_p, o_p = max, sum and weighted values of part p's exponentials
    out = sum_p exp(m_p - m) o_p / sum_p exp(m_p - m) l_p            with m = max_p m_p

PyTorch's kernels that take a mask walk all keys of a head in one program. While one sequence decodes there are as many
programs as heads of keys, so that most of a GPU is idle and a long cache is read at a fraction of its bandwidth. Here a
part of each head is a matrix of a batched product (flash decoding, in plain operators).
"""

import math

import torch
from torch import Tensor

from retnet.ops.derivatives import needs_plain_form
from retnet.ops.dtypes import wide_dtype

PART = 4096  # keys per part
LEAST_KEYS = 4 * PART  # below, one program per head takes about as long
MOST_QUERIES = 64  # scores are held in memory
MOST_PROGRAMS = 32  # sequences times heads of keys: more of them fill a GPU
DEVICES = ("cuda",)


def reads_in_parts(q: Tensor, k: Tensor) -> bool:
    """Whether attention of q [B, G, N, K] to k [B, G, S, K] is better computed here."""
    few = q.shape[2] <= MOST_QUERIES and q.shape[0] * q.shape[1] <= MOST_PROGRAMS
    derived = (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)) or needs_plain_form(q, k)
    return few and k.shape[2] >= LEAST_KEYS and q.device.type in DEVICES and not derived


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """q [B, G, N, K], k [B, G, S, K], v [B, G, S, V] -> [B, G, N, V] in v's dtype; without gradients.

    mask: as `scaled_dot_product_attention` takes it, to [B, G, N, S]: bool, or added to the scores. Every query sees at
    least one key. No key is copied: k and v may be views of [B, S, G, ...].
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    mask = mask.expand(*q.shape[:3], k.shape[2])
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=v.dtype)
    for b in range(q.shape[0]):
        for g in range(q.shape[1]):
            spans = _spans(k.shape[2])
            found = [_parts(q[b, g], k[b, g, s], v[b, g, s], mask[b, g, :, s], n, factor) for s, n in spans]
            largest, total, values = (torch.cat(pieces) for pieces in zip(*found, strict=True))
            share = torch.exp(largest - largest.amax(0))  # [P, N]
            out[b, g] = (share[..., None] * values).sum(0) / (share * total).sum(0)[..., None]
    return out


def _spans(num_keys: int) -> list[tuple[slice, int]]:
    """Runs of keys, each with its number of equal parts: whole parts, and the rest."""
    whole = num_keys // PART * PART
    spans = [(slice(0, whole), whole // PART)] if whole else []
    return [*spans, (slice(whole, num_keys), 1)] if whole < num_keys else spans


def _parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, parts: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(m [P, N], l [P, N], o [P, N, V]) of q [N, K] and k, v, mask [N, S] cut into P parts; in float32 or wider."""
    k, v = (x.unflatten(0, (parts, -1)) for x in (k, v))
    mask = mask.unflatten(1, (parts, -1)).transpose(0, 1)
    scores = _wide_product(q.expand(parts, *q.shape), k.transpose(1, 2)) * scale
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    # A part that no query sees has the maximum -inf, and the weight 0.
    largest = scores.amax(-1)
    weights = torch.exp(scores - largest.clamp_min(torch.finfo(scores.dtype).min)[..., None])
    return largest, weights.sum(-1), _wide_product(weights.to(v.dtype), v)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices [P, ...] in float32 or wider: half precision would round scores by more than a weight."""
    wide = wide_dtype(a.dtype)
    if a.dtype == wide:
        return torch.bmm(a, b)
    if a.device.type in DEVICES:
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))
