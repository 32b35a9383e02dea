"""The decode step that reads the state and a ring of waiting rows, and writes one row (`ops/deferred.py`).

A program owns BV values of one head and streams their [K, BV] cells of the state in slabs of rows: nothing of it is
kept, so wide slices and many bytes in flight cost few registers. The ring is small beside the state, and rows that do
not wait are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.layout import head_rows
from retnet.kernels.tiles import power_of_two


def retention_defer(
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
    """One token, the state read only; out [B, 1, H, V] in v's dtype."""
    B, _, G, K = q.shape
    H, V = v.shape[2:]
    for name, x in (("k_rows", k_rows), ("v_rows", v_rows), ("state", state)):
        if x.stride(3) != 1 or (name == "state" and x.stride(2) != V):
            raise ValueError(f"{name} has strides {x.stride()}; accepted: contiguous rows, and a state's rows likewise")
    out = torch.empty(B, 1, H, V, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    BV = defer_width(V, B * H)
    _defer_kernel[(B * H * triton.cdiv(V, BV),)](
        q,
        k,
        v,
        log_decay.contiguous(),
        state,
        k_rows,
        v_rows,
        pending,
        None if mask is None else mask.contiguous().view(torch.uint8),
        out,
        *(q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2)),
        *state.stride()[:2],
        *k_rows.stride()[:3],
        *v_rows.stride()[:3],
        scale,
        H=H,
        HEADS_PER_GROUP=H // G,
        W=k_rows.shape[1],
        K=K,
        V=V,
        BW=power_of_two(k_rows.shape[1]),
        BK=power_of_two(K),
        BV=BV,
        SLAB=min(power_of_two(K), 8192 // BV),
        num_warps=4,
    )
    return out


def defer_width(V: int, heads: int) -> int:
    """Values a program reads: 128 fill whole lines of memory; fewer where that leaves the chip's processors idle."""
    BV = min(128, power_of_two(V))
    while BV > 16 and heads * V // BV < 512:
        BV //= 2
    return BV


@triton.jit(do_not_specialize=["q_batch", "k_batch", "v_batch"])
def _defer_kernel(
    q, k, v, log_decay, state, k_rows, v_rows, pending, mask, out,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, state_batch, state_head,
    k_rows_batch, k_rows_token, k_rows_head, v_rows_batch, v_rows_token, v_rows_head, scale,
    H: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BW: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    V_TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    h = (pid // V_TILES) % H
    b = (pid // (V_TILES * H)).to(tl.int64)
    group = h // HEADS_PER_GROUP
    columns = pid % V_TILES * BV + tl.arange(0, BV)
    column_ok = columns < V
    n = tl.load(pending + b).to(tl.int32)
    alive = n >= 0
    if mask is not None:
        alive = alive & (tl.load(mask + b) != 0)
    rate = tl.maximum(tl.load(log_decay + h), -1e30)  # finite, so that gamma = 0 gives 0^0 = 1
    q = head_rows(q, b, group, q_batch, q_head)
    state = head_rows(state, b, h, state_batch, state_head)

    old = tl.zeros([SLAB, BV], dtype=tl.float32)
    for r0 in tl.static_range(0, BK, SLAB):
        rows = r0 + tl.arange(0, SLAB)
        cells = state + rows[:, None] * V + columns[None, :]
        S = tl.load(cells, mask=(rows < K)[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
        old += tl.load(q + rows, mask=rows < K, other=0.0).to(tl.float32)[:, None] * S

    features, waiting = tl.arange(0, BK), tl.arange(0, BW)
    qs = tl.load(q + features, mask=features < K, other=0.0).to(tl.float32)
    new_k = tl.load(head_rows(k, b, group, k_batch, k_head) + features, mask=features < K, other=0.0)
    new_v = tl.load(head_rows(v, b, h, v_batch, v_head) + columns, mask=column_ok, other=0.0)
    k_rows = head_rows(k_rows, b, group, k_rows_batch, k_rows_head)
    v_rows = head_rows(v_rows, b, h, v_rows_batch, v_rows_head)
    ks = tl.load(
        k_rows + waiting[:, None] * k_rows_token + features[None, :],
        mask=(waiting < n)[:, None] & (features < K)[None, :],
        other=0.0,
    ).to(tl.float32)
    vs = tl.load(
        v_rows + waiting[:, None] * v_rows_token + columns[None, :],
        mask=(waiting < n)[:, None] & column_ok[None, :],
        other=0.0,
    ).to(tl.float32)
    weights = tl.sum(ks * qs[None, :], 1) * tl.exp(rate * tl.maximum(n - waiting, 0).to(tl.float32))
    result = tl.sum(old, 0) * tl.exp(rate * (n + 1).to(tl.float32)) + tl.sum(weights[:, None] * vs, 0)
    result += tl.sum(qs * new_k.to(tl.float32), 0) * new_v.to(tl.float32)
    result = tl.where(alive, result * scale, 0.0)
    tl.store(out + (b * H + h) * V + columns, result.to(out.dtype.element_ty), mask=column_ok)
    writes = alive & (n < W)
    tl.store(v_rows + n * v_rows_token + columns, new_v, mask=tl.where(writes, columns, V) < V)
    if (pid % V_TILES == 0) & (h % HEADS_PER_GROUP == 0):
        tl.store(k_rows + n * k_rows_token + features, new_k, mask=tl.where(writes, features, K) < K)
