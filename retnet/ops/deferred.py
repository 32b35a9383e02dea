"""Decoding with deferred writes: the state is read at every step and written once in many.

A decode step moves the whole state twice, to read it and to write it back. Here the last keys and values wait in a ring
of W rows beside a state that stays n = `pending` tokens behind, and a step adds what they would have contributed:

    out = scale (gamma^(n+1) q S + sum_{j < n} gamma^(n-j) (q . k_j) v_j + (q . k) v)

After at most W steps `retention_fold_` brings the state up to date. State traffic is 1 + 2 / W instead of 2, the state
is exact, and dropping the last rows is a rollback. Left out: decay per token (`retention_step_` takes it).
"""

import torch
from torch import Tensor

from retnet.ops.retention import retention_step_


def retention_defer_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    pending: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One token read with a state that lacks its `pending` last tokens; the token becomes row `pending`. No gradients.

    Args:
        q, k: [B, 1, G, K], v: [B, 1, H, V], log_decay: [H]; as for `retention`.
        state: [B, H, K, V], only read.
        k_rows, v_rows: [B, W, G, K] and [B, W, H, V] in the dtypes of k and v; row pending[b] is written.
        pending: [B] int32 or int64, each below W: how many rows the state lacks. The caller raises it after the step
            of all layers, by `mask` where there is one.
        mask: [B] or [B, 1] bool; a sequence that is False writes nothing and gives out = 0.

    Returns:
        out [B, 1, H, V] in v's dtype.
    """
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    W = k_rows.shape[1]
    expected = {
        "k": (k, (B, 1, G, K)),
        "v": (v, (B, 1, H, V)),
        "log_decay": (log_decay, (H,)),
        "state": (state, (B, H, K, V)),
        "k_rows": (k_rows, (B, W, G, K)),
        "v_rows": (v_rows, (B, W, H, V)),
        "pending": (pending, (B,)),
    }
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; accepted for q {list(q.shape)}: {list(shape)}")
    if T != 1 or H % G:
        raise ValueError(f"q is {list(q.shape)} and v {list(v.shape)}; accepted: one token, and G dividing H")
    if k_rows.dtype != k.dtype or v_rows.dtype != v.dtype:
        raise TypeError(
            f"rows are {k_rows.dtype} and {v_rows.dtype}; accepted: the dtypes of k and v, {k.dtype} and {v.dtype}"
        )
    scale = float(K**-0.5 if scale is None else scale)
    mask = None if mask is None else mask.reshape(B)
    return torch.ops.retnet.retention_defer_(q, k, v, log_decay, state, k_rows, v_rows, pending, scale, mask)


def retention_fold_(log_decay: Tensor, state: Tensor, k_rows: Tensor, v_rows: Tensor, pending: Tensor) -> None:
    """Write the `pending` first rows of each sequence's ring into its state; the caller then sets `pending` to 0."""
    waiting = torch.arange(k_rows.shape[1], device=pending.device) < pending[:, None]
    retention_step_(k_rows, k_rows, v_rows, log_decay, state, scale=1.0, mask=waiting)


@torch.library.custom_op("retnet::retention_defer_", mutates_args=("k_rows", "v_rows"), device_types="cpu")
def _defer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    pending: Tensor,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    W, heads_per_group = k_rows.shape[1], v.shape[2] // q.shape[2]
    wide = torch.promote_types(v.dtype, torch.float32)
    alive = torch.ones_like(pending, dtype=torch.bool) if mask is None else mask
    at = alive.nonzero()[:, 0]
    k_rows[at, pending[at]], v_rows[at, pending[at]] = k[at, 0], v[at, 0]
    behind = pending[:, None] - torch.arange(W)
    rate = log_decay.clamp(min=-1e30)  # finite, so that gamma = 0 gives 0^0 = 1
    weights = (behind.clamp(min=0)[..., None] * rate).exp().masked_fill(~(alive[:, None] & (behind >= 0))[..., None], 0)
    q_heads = q[:, 0].to(wide).repeat_interleave(heads_per_group, 1)
    rows = k_rows.masked_fill((behind < 0)[..., None, None], 0).to(wide).repeat_interleave(heads_per_group, 2)
    scores = torch.einsum("bhk,bwhk->bwh", q_heads, rows) * weights
    values = v_rows.masked_fill((behind < 0)[..., None, None], 0).to(wide)
    old = torch.einsum("bhk,bhkv->bhv", q_heads, state.to(wide)) * ((pending[:, None] + 1) * rate).exp()[..., None]
    out = torch.einsum("bwh,bwhv->bhv", scores, values) + old * alive[:, None, None]
    return (out * scale).to(v.dtype)[:, None]


@_defer.register_kernel("cuda")
def _defer_cuda(q, k, v, log_decay, state, k_rows, v_rows, pending, scale, mask):
    from retnet.kernels.deferred import retention_defer

    return retention_defer(q, k, v, log_decay, state, k_rows, v_rows, pending, scale, mask)


@_defer.register_fake
def _(q, k, v, log_decay, state, k_rows, v_rows, pending, scale, mask):
    return v.new_empty(v.shape)
