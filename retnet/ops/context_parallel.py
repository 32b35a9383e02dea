"""Retention and the selective scan on one shard of a long row, exactly as on the whole row.

Both are linear in the state before the first token. So a shard computes its own part at once, from an empty state; the
exchange of final states runs meanwhile; what the carried state adds comes last.
"""

from typing import Any

import torch
from torch import Tensor

from retnet.ops.context_shard import ContextShard
from retnet.ops.dtypes import wide_dtype
from retnet.ops.retention import retention
from retnet.ops.selective_scan import selective_scan


def context_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    shard: ContextShard,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`retention` of the tokens of one shard; arguments and results as there, of this shard.

    state: of the sequences that begin on this shard (a sequence that goes on from the shard before has zeros there).
    cu_seqlens: the shard's own bounds. The returned state is that after the last token of each sequence on the shard.
    """
    out, final = retention(
        q, k, v, log_decay, scale=scale, state=state, mask=mask, cu_seqlens=cu_seqlens, **options, return_state=True
    )
    assert final is not None
    decays = _decays(log_decay, q.shape[0], q.shape[1], mask)
    exchange = shard.exchange(shard.last(final), decays.sum(1)[..., None, None].to(final.dtype))
    first = slice(0, shard.first_tokens)
    reach = decays[:, first].cumsum(1)
    queries = q[:, first].to(reach.dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    queries = queries.repeat_interleave(v.shape[2] // q.shape[2], 2) * reach.exp()[..., None]
    if mask is not None:
        queries = queries * mask[:, first, None, None]
    carry = exchange.carry()
    more = torch.einsum("bthk,bhkv->bthv", queries.to(out.dtype), carry.to(out.dtype))
    out = torch.cat([out[:, first] + more, out[:, shard.first_tokens :]], 1)
    return out, shard.add_to_first(final, reach[:, -1, :, None, None].exp().to(final.dtype) * carry)


def _decays(log_decay: Tensor, B: int, T: int, mask: Tensor | None) -> Tensor:
    """The log decay of each token [B, T, H]; 0 where the mask is False."""
    decays = log_decay.expand(B, T, -1)
    return decays if mask is None else decays.masked_fill(~mask[..., None], 0)


def context_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    shard: ContextShard,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of the tokens of one shard; arguments and results as there, of this shard."""
    y, final = selective_scan(x, step, rate, write, read, cu_seqlens=cu_seqlens)
    wide = wide_dtype(x.dtype)
    first = slice(0, shard.first_tokens)

    def decay(tokens: slice) -> Tensor:
        return step[:, tokens].to(wide).sum(1)[..., None] * rate.to(wide)

    exchange = shard.exchange(shard.last(final), decay(slice(None)))
    carry = exchange.carry()
    more, _ = selective_scan(
        torch.zeros_like(x[:, first]), step[:, first], rate, write[:, first], read[:, first], state=carry
    )
    y = torch.cat([y[:, first] + more, y[:, shard.first_tokens :]], 1)
    return y, shard.add_to_first(final, decay(first).exp() * carry)
