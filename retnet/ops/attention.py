"""Causal softmax attention on tensors: PyTorch's kernels with windows, ALiBi, sinks and packed documents.

    out_i = sum_j p_ij v_j                                     over 0 <= i - j < window
    p_ij = exp(s_ij) / (exp(sink_h) + sum_j exp(s_ij))         s_ij = scale q_i k_j - slope_h (i - j)

Without a sink, its exponential is 0. A sink takes a share of the weights and has no value, so a head may attend to
little or nothing (gpt-oss; a logit of 0 is "softmax off by one").

Plain causal attention is one call of `scaled_dot_product_attention`. Windows and ALiBi call it per block of queries,
each with the keys that it can see, so that memory and work are linear in T for a window. Sinks are products and a
softmax of our own, because PyTorch's call has neither sinks nor the sum of exponentials. On CUDA, windows, ALiBi, sinks
and packed documents use `flex_attention`, which skips masked blocks. Elsewhere, packed documents are computed one by
one: no key of one is multiplied with a query of another. The results agree up to rounding.
"""

import functools
import math
from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from retnet.ops.decay import alibi_log_decay
from retnet.ops.derivatives import needs_plain_form
from retnet.ops.dtypes import wide_dtype

QUERY_BLOCK = 512  # queries per mask
SINK_SCORES = 1 << 22  # scores per head that are held at a time where there are sinks
FLEX_BLOCK = 128  # queries and keys per block that flex attention computes or skips


class ScoreOptions(TypedDict, total=False):
    """What changes scores and weights. window: tokens that a query sees, itself included (None: all before it).

    slopes: of ALiBi, [H]. sinks: the log of what each head adds to its sum of exponentials, [H]. scale: of q k, None
    for K ** -0.5. dropout: of the weights.
    """

    window: int | None
    slopes: Tensor | None
    sinks: Tensor | None
    scale: float | None
    dropout: float


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Slope of each head [H], float32 (Press et al. 2022, arXiv 2108.12409)."""
    return -alibi_log_decay(num_heads, device=device)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[ScoreOptions]) -> Tensor:
    """T tokens attend to themselves and to earlier ones.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V] with G dividing H (head h reads group h // (H // G)). Returns
    [B, T, H, V].
    """
    T, window = q.shape[1], options.get("window")
    if T == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    plain = options.get("slopes") is None and options.get("sinks") is None
    if plain and (window is None or window >= T):
        out = _dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=options.get("dropout", 0.0),
            scale=options.get("scale"),
            is_causal=True,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)
    positions = torch.arange(T, device=q.device)[None]
    block = _query_block(T, options) if window is None else max(64, min(QUERY_BLOCK, window))
    out = []
    for start in range(0, T, block):
        queries = slice(start, start + block)
        keys = slice(0 if window is None else max(0, start - window + 1), start + block)
        out.append(_attend(q[:, queries], k[:, keys], v[:, keys], positions[:, queries], positions[:, keys], **options))
    return torch.cat(out, 1)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    **options: Unpack[ScoreOptions],
) -> Tensor:
    """Causal attention by the positions of queries [B, T] and keys [B, S], in any order; a negative one has no token.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]. Returns [B, T, H, V].
    """
    block = _query_block(k.shape[1], options)
    out = [v.new_zeros(q.shape[0], 0, q.shape[2], v.shape[3])]
    for start in range(0, q.shape[1], block):
        queries = slice(start, start + block)
        out.append(_attend(q[:, queries], k, v, query_positions[:, queries], key_positions, **options))
    return torch.cat(out, 1)


def _query_block(num_keys: int, options: ScoreOptions) -> int:
    """Queries whose scores are held at a time."""
    if options.get("sinks") is None:
        return QUERY_BLOCK
    return max(1, min(QUERY_BLOCK, SINK_SCORES // max(1, num_keys)))


def _dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """`scaled_dot_product_attention`, in plain operators where derivatives are asked of it that no kernel has."""
    if needs_plain_form(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q, k, v, **options)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    window: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One block of queries. Heads that share keys are stacked along the queries, so that no key is copied."""
    T, H, G = q.shape[1], q.shape[2], k.shape[2]
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (key_positions[:, None, :] >= 0) & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    mask = seen[:, None, None]
    if slopes is not None:
        bias = -slopes.to(q.dtype).view(1, G, H // G, 1, 1) * distance[:, None, None].to(q.dtype)
        mask = bias.masked_fill(~mask, -math.inf)
    mask = mask.expand(-1, -1, H // G, -1, -1).flatten(2, 3)
    q = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if sinks is None:
        out = _dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    else:
        per_query = sinks.view(G, H // G, 1).expand(-1, -1, T).flatten(1)
        out = _attend_beside_sinks(q, k, v, mask, per_query, scale, dropout)
    return out.unflatten(2, (H // G, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _attend_beside_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float | None, dropout: float
) -> Tensor:
    """q [B, G, N, K], k [B, G, S, K], v [B, G, S, V], a mask [.., .., N, S] as PyTorch takes it, sinks [G, N]."""
    wide = wide_dtype(q.dtype)
    scores = ((q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)).to(wide)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    sinks = sinks.to(wide)[..., None].expand(len(q), -1, -1, -1)
    weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    return F.dropout(weights.to(v.dtype), dropout) @ v


def block_mask(first_seen: Tensor, before: int = 0, num_keys: int | None = None):
    """The mask of `flex_causal_attention`: query i of row b sees keys first_seen[b, i] to before + i.

    first_seen is [B, T]. before: keys before that of the first query, num_keys: of all (None: before + T).

    first_seen never falls along a row. So the ends of two blocks decide whether a block of queries sees all, some or
    none of a block of keys, and nothing of size T x T is computed. Windows and documents differ only in the values of
    this tensor, so one compiled kernel serves all. After eight variants, torch.compile would fall back to slow code.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + before) & (j >= first_seen[b, i])

    B, T = first_seen.shape
    S = before + T if num_keys is None else num_keys
    blocks = -(-T // FLEX_BLOCK)
    padded = torch.cat([first_seen, first_seen[:, -1:].expand(B, blocks * FLEX_BLOCK - T)], 1)
    of_block = padded.view(B, blocks, FLEX_BLOCK)
    queries = torch.arange(blocks, device=first_seen.device)[:, None] * FLEX_BLOCK
    keys = torch.arange(-(-S // FLEX_BLOCK), device=first_seen.device) * FLEX_BLOCK
    last_query, last_key = queries + FLEX_BLOCK - 1, keys + FLEX_BLOCK - 1
    visible = (keys <= last_query + before) & (last_key >= of_block[:, :, :1])  # [B, blocks of queries, of keys]
    whole = (last_key <= queries + before) & (keys >= of_block[:, :, -1:]) & (last_query < T)
    return BlockMask.from_kv_blocks(
        *_listed(visible & ~whole), *_listed(whole), BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen, seq_lengths=(T, S)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, m] bool -> the number of true entries [B, 1, n] and the indices [B, 1, n, m], true ones first; int32."""
    count = blocks.sum(-1, dtype=torch.int32)
    return count[:, None], blocks.int().argsort(dim=-1, descending=True, stable=True).int()[:, None]


def flex_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    before: int = 0,
) -> Tensor:
    """`causal_attention` on CUDA under a mask made by `block_mask`, without dropout; the same shapes.

    before: as for the mask.
    """

    def penalised(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (before + i - j)  # type: ignore[index]

    heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    score_mod, attend = None if slopes is None else penalised, _compiled_flex_attention()
    options = {"score_mod": score_mod, "block_mask": mask, "enable_gqa": q.shape[2] != k.shape[2]}
    if sinks is None:
        return attend(*heads, **options).transpose(1, 2)
    from torch.nn.attention.flex_attention import AuxRequest

    out, found = attend(*heads, **options, return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(found.lse - sinks.to(found.lse.dtype)[:, None])  # of the sum without the sink in the whole
    return (out * share[..., None].to(out.dtype)).transpose(1, 2)


@functools.cache
def _compiled_flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
