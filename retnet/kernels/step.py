"""Decoding: one or a few tokens read recurrently (paper Eq. 6), the state updated in place.

    S <- exp(log_decay_t) S + k_t^T v_t        out_t = scale q_t S

Decoding moves states and little else, so a program owns a [K, BV] slice of one head's state with all of K: it is read
once, kept in float32 registers over the T tokens, and written once, and no sum crosses programs. A state narrower than
float32 is rounded stochastically: to nearest, a decay above 1 - 2^-9 would leave a bfloat16 state unchanged and nothing
would be forgotten. The random bits are a hash of the call's q and k, the value and its place: equal inputs, equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.tiles import power_of_two, step_tile

# Bits of a float32 significand that a narrower dtype drops.
DROPPED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    """q, k [B, T, G, K], v [B, T, H, V], state [B, H, K, V] (updated) -> out [B, T, H, V] in v's dtype."""
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    if state.dtype not in DROPPED_BITS:
        raise TypeError(f"state is {state.dtype}; accepted on a GPU: {', '.join(map(str, DROPPED_BITS))}")
    if state.stride(3) != 1 or state.stride(2) != V:
        raise ValueError(
            f"state has strides {state.stride()}; accepted: [K, V] of each head contiguous, to be updated in place"
        )
    out = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    BV, warps = step_tile(K, V, B * H, state.dtype)
    _step_kernel[(B * H * triton.cdiv(V, BV),)](
        q,
        k,
        v,
        log_decay.contiguous(),
        state,
        None if mask is None else mask.contiguous().view(torch.uint8),
        out,
        T,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *state.stride()[:2],
        scale,
        H=H,
        HEADS_PER_GROUP=H // G,
        K=K,
        V=V,
        BK=power_of_two(K),
        BV=BV,
        PER_TOKEN=log_decay.dim() == 3,
        MASKED=mask is not None,
        DROPPED_BITS=DROPPED_BITS[state.dtype],
        num_warps=warps,
    )
    return out


def retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    state_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, V], the state [B, H, K, V] after the T tokens), the given state left as it was."""
    shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    if state is None:
        final = torch.zeros(shape, dtype=state_dtype, device=v.device)
    else:
        final = torch.empty(shape, dtype=state_dtype, device=v.device).copy_(state)
    return retention_step(q, k, v, log_decay, final, scale, mask), final


@triton.jit(do_not_specialize=["T", "q_batch", "k_batch", "v_batch"])
def _step_kernel(
    q, k, v, log_decay, state, mask, out, T,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, state_batch, state_head, scale,
    H: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, DROPPED_BITS: tl.constexpr,
):  # fmt: skip
    V_TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    h = (pid // V_TILES) % H
    b = (pid // (V_TILES * H)).to(tl.int64)
    rows, columns = tl.arange(0, BK), pid % V_TILES * BV + tl.arange(0, BV)
    row_ok, column_ok = rows < K, columns < V
    cell = rows[:, None] * V + columns[None, :]
    in_state = row_ok[:, None] & column_ok[None, :]
    state += b * state_batch + h * state_head
    S = tl.load(state + cell, mask=in_state, other=0.0).to(tl.float32)
    q += b * q_batch + (h // HEADS_PER_GROUP) * q_head
    k += b * k_batch + (h // HEADS_PER_GROUP) * k_head
    v += b * v_batch + h * v_head
    seed = tl.zeros([BK], dtype=tl.int32)
    for t in range(T):
        token = b * T + t
        k_ok, v_ok = row_ok, column_ok
        if MASKED:
            alive = tl.load(mask + token) != 0
            k_ok, v_ok = tl.where(alive, rows, K) < K, tl.where(alive, columns, V) < V
        qt = tl.load(q + rows, mask=k_ok, other=0.0).to(tl.float32) * scale
        kt = tl.load(k + rows, mask=k_ok, other=0.0).to(tl.float32)
        vt = tl.load(v + columns, mask=v_ok, other=0.0).to(tl.float32)
        if PER_TOKEN:
            step = tl.load(log_decay + token * H + h)
        else:
            step = tl.load(log_decay + h)
        if MASKED:
            step = tl.where(alive, step, 0.0)
        S = S * tl.exp(step) + kt[:, None] * vt[None, :]
        tl.store(
            out + (token * H + h) * V + columns, tl.sum(qt[:, None] * S, 0).to(out.dtype.element_ty), mask=column_ok
        )
        q, k, v = q + q_token, k + k_token, v + v_token
        if DROPPED_BITS > 0:
            seed = seed * 31 + kt.to(tl.int32, bitcast=True) + qt.to(tl.int32, bitcast=True)
    if DROPPED_BITS > 0:
        S = _round_stochastically(S, cell, tl.sum(seed, 0), DROPPED_BITS)
    tl.store(state + cell, S.to(state.dtype.element_ty), mask=in_state)


@triton.jit
def _round_stochastically(x, place, seed, DROPPED_BITS: tl.constexpr):
    """x rounded up or down to the kept bits, with the odds of its distance: right on average."""
    # The seed is mixed thoroughly, once a program; over calls it alone makes the noise of any value uniform.
    seed = seed.to(tl.uint32, bitcast=True)
    seed = (seed ^ (seed >> 16)) * 0x7FEB352D
    seed = (seed ^ (seed >> 15)) * 0x46D9F3B3
    seed = seed ^ (seed >> 16)
    bits = x.to(tl.uint32, bitcast=True)
    noise = (bits * 0x2C1B3C6D + place.to(tl.uint32, bitcast=True) * 0x27D4EB2D + seed) >> (32 - DROPPED_BITS)
    kept = (bits + noise) & (0xFFFFFFFF - ((1 << DROPPED_BITS) - 1))
    return kept.to(tl.float32, bitcast=True)
