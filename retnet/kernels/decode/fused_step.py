"""The fused step of retention for decoding: rotates q and k and advances the state by one token, in one launch.

    S <- gamma_t S + k_t^T v_t        out_t = scale q_t S        q, k: rotated by the token's angles first

As in `recurrent.py`, a program owns a [K, BV] slice of one head's state, and no sum crosses programs. The states of
inactive sequences are not read. q, k and v are columns of one packed projection.

With a ring, writes are deferred. The state is up to W - 1 tokens old, the ring holds the tokens since then, and

    out_t = scale (gamma_(0..t) q_t S_0 + sum_i gamma_(i..t) (q_t k_i) v_i)

The token that fills the ring writes all W tokens into the state. This is another order of summation than W calls of
`recurrence.advance`: the state is rounded once per W tokens. A state is read once per token and written once per W
tokens. Every sequence counts its own pending tokens, so its results do not depend on when other sequences started.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.decode.recurrence import advance
from retnet.kernels.dependent_launch import await_previous, dependent_launch, start_next
from retnet.kernels.device import power_of_two
from retnet.kernels.retention.tiles import step_tile

SLAB_CELLS = 8192  # numbers of a state that a program loads at a time
FOLD_ROWS = 16  # rows of a state that a full ring updates at a time: few, so that this rare pass stays in registers


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    rotary: str,
    log_decay: Tensor,
    state: Tensor,
    active: Tensor,
    ring: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    """q [B, H, K], k [B, G, K], v [B, G, V], state [B, H, K, V] float32 (updated) -> out [B, H, V].

    rotation: cos, sin [B, K / 2] float32. log_decay: [H] or [B, H], float32. active [B].
    ring: keys [B, G, W, K], values [B, G, W, V], log decays [B, H, W], pending [B] (tokens in it, counted by the
        caller).
    """
    B, H, K = q.shape
    G, V = v.shape[1:]
    out = torch.empty(B, H, V, dtype=v.dtype, device=v.device)
    cos, sin = (None, None) if rotation is None else rotation
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], state.stride(0))
    shared = {
        "H": H,
        "HEADS_PER_GROUP": H // G,
        "K": K,
        "V": V,
        "BK": power_of_two(K),
        "ROTARY": "none" if rotation is None else rotary,
        "PER_TOKEN": log_decay.dim() == 2,
        **dependent_launch(v.device),
    }
    active = active.view(torch.uint8)
    if ring is None:
        tile = step_tile(K, V, B * H, state.dtype)
        _write_kernel[(B * H * triton.cdiv(V, tile.BV),)](
            q, k, v, cos, sin, log_decay, state, active, out, *strides, scale,
            BV=tile.BV, num_warps=tile.warps, **shared,
        )  # fmt: skip
        return out
    BV, slab = defer_tile(K, V, B * H)
    _defer_kernel[(B * H * triton.cdiv(V, BV),)](
        q, k, v, cos, sin, log_decay, state, active, out, *ring, *strides, scale,
        BV=BV, SLAB=slab, FOLD=min(FOLD_ROWS, slab), W=ring[0].shape[2], num_warps=4, **shared,
    )  # fmt: skip
    return out


def defer_tile(K: int, V: int, heads: int) -> tuple[int, int]:
    """(values, rows per slab) of a program: 64 values fill whole lines of memory; fewer occupy all processors.

    The state is only read, slab by slab, and no slab is kept.
    """
    BV = min(64, power_of_two(V))
    while BV > 16 and heads * V // BV < 512:
        BV //= 2
    return BV, min(power_of_two(K), SLAB_CELLS // BV)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, rotary: str) -> None:
    """x [N, H, K] (any strides of tokens and heads) rotated in place by (cos, sin) [N, K / 2] float32."""
    N, H, K = x.shape
    _rotate_kernel[(N, H)](
        x, cos, sin, *x.stride()[:2], K=K, BP=triton.next_power_of_2(K // 2), ROTARY=rotary, num_warps=1
    )


@triton.jit
def _rotate_kernel(x, cos, sin, token, head, K: tl.constexpr, BP: tl.constexpr, ROTARY: tl.constexpr):
    """Each pair is read and written by one thread, so it can be overwritten."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = K // 2
    pair = tl.arange(0, BP)
    ok = pair < HALF
    if ROTARY == "interleaved":
        at, other = 2 * pair, 2 * pair + 1
    else:
        at, other = pair, pair + HALF
    x += n * token + h * head
    first = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(x + other, mask=ok, other=0.0).to(tl.float32)
    c, s = tl.load(cos + n * HALF + pair, mask=ok, other=0.0), tl.load(sin + n * HALF + pair, mask=ok, other=0.0)
    tl.store(x + at, (first * c - second * s).to(x.dtype.element_ty), mask=ok)
    tl.store(x + other, (second * c + first * s).to(x.dtype.element_ty), mask=ok)


@triton.jit
def _rotated(x, row, row_ok, cos, sin, K: tl.constexpr, ROTARY: tl.constexpr):
    """x [BK] rotated, in x's precision."""
    own = tl.load(x + row, mask=row_ok, other=0.0)
    rotated = own.to(tl.float32)
    if ROTARY != "none":
        HALF: tl.constexpr = K // 2
        if ROTARY == "interleaved":
            pair, other, second = row // 2, row ^ 1, row % 2
        else:
            pair, other, second = row % HALF, (row + HALF) % K, row // HALF
        partner = tl.load(x + other, mask=row_ok, other=0.0).to(tl.float32)
        c, s = tl.load(cos + pair, mask=row_ok, other=0.0), tl.load(sin + pair, mask=row_ok, other=0.0)
        rotated = rotated * c + tl.where(second == 1, partner, -partner) * s
        rotated = rotated.to(own.dtype).to(tl.float32)
    return rotated


@triton.jit
def _begin(H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DEPENDENT: tl.constexpr):
    """This program's tile of values, head and sequence, after waiting for the kernels before it."""
    start_next(DEPENDENT)
    await_previous(DEPENDENT)
    V_TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    return pid % V_TILES, (pid // V_TILES) % H, (pid // (V_TILES * H)).to(tl.int64)


@triton.jit
def _write_kernel(
    q, k, v, cos, sin, log_decay, state, active, out,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, state_batch, scale,
    H: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ROTARY: tl.constexpr, PER_TOKEN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    tile, h, b = _begin(H, V, BV, DEPENDENT)
    row, column = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    row_ok, column_ok = row < K, column < V
    out += (b * H + h) * V
    if tl.load(active + b) == 0:
        tl.store(out + column, tl.zeros([BV], out.dtype.element_ty), mask=column_ok)
    else:
        state += b * state_batch + h * (K * V)
        cell = row[:, None] * V + column[None, :]
        in_state = row_ok[:, None] & column_ok[None, :]
        S = tl.load(state + cell, mask=in_state, other=0.0)
        g = h // HEADS_PER_GROUP
        pair_cos = None if ROTARY == "none" else cos + b * (K // 2)
        pair_sin = None if ROTARY == "none" else sin + b * (K // 2)
        qt = _rotated(q + b * q_batch + h * q_head, row, row_ok, pair_cos, pair_sin, K, ROTARY) * scale
        kt = _rotated(k + b * k_batch + g * k_head, row, row_ok, pair_cos, pair_sin, K, ROTARY)
        vt = tl.load(v + b * v_batch + g * v_head + column, mask=column_ok, other=0.0).to(tl.float32)
        S = advance(S, tl.load(log_decay + (b * H + h if PER_TOKEN else h)), kt, vt)
        tl.store(out + column, tl.sum(qt[:, None] * S, 0).to(out.dtype.element_ty), mask=column_ok)
        tl.store(state + cell, S, mask=in_state)


@triton.jit
def _defer_kernel(
    q, k, v, cos, sin, log_decay, state, active, out, keys, values, logs, pending,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, state_batch, scale,
    H: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SLAB: tl.constexpr, FOLD: tl.constexpr, W: tl.constexpr,
    ROTARY: tl.constexpr, PER_TOKEN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    tile, h, b = _begin(H, V, BV, DEPENDENT)
    column = tile * BV + tl.arange(0, BV)
    column_ok = column < V
    out += (b * H + h) * V
    if tl.load(active + b) == 0:
        tl.store(out + column, tl.zeros([BV], out.dtype.element_ty), mask=column_ok)
    else:
        g = h // HEADS_PER_GROUP
        state += b * state_batch + h * (K * V)
        q += b * q_batch + h * q_head
        k += b * k_batch + g * k_head
        pair_cos = None if ROTARY == "none" else cos + b * (K // 2)
        pair_sin = None if ROTARY == "none" else sin + b * (K // 2)
        n, i = tl.load(pending + b).to(tl.int32), tl.arange(0, W)
        there = i < n
        ring = (b * (H // HEADS_PER_GROUP) + g) * W
        logs += (b * H + h) * W
        decay = tl.load(log_decay + (b * H + h if PER_TOKEN else h))
        age = tl.load(logs + i, mask=there, other=0.0)
        # Decay since token i: over the later tokens and this one. Logs are added, never subtracted: -inf is a reset.
        since = tl.sum(tl.where(i[None, :] > i[:, None], age[None, :], 0.0), 1) + decay
        total = tl.exp(tl.sum(age, 0) + decay)
        weight = tl.where(there, tl.exp(since), 0.0)
        vt = tl.load(v + b * v_batch + g * v_head + column, mask=column_ok, other=0.0).to(tl.float32)
        old, score, own = tl.zeros([BV], tl.float32), tl.zeros([W], tl.float32), tl.zeros([SLAB], tl.float32)
        for r0 in tl.static_range(0, BK, SLAB):
            row = r0 + tl.arange(0, SLAB)
            row_ok = row < K
            cell = row[:, None] * V + column[None, :]
            S = tl.load(state + cell, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
            qt = _rotated(q, row, row_ok, pair_cos, pair_sin, K, ROTARY) * scale
            kt = _rotated(k, row, row_ok, pair_cos, pair_sin, K, ROTARY)
            k_rows = tl.load(
                keys + ring * K + i[:, None] * K + row[None, :], mask=there[:, None] & row_ok[None, :], other=0.0
            ).to(tl.float32)
            old += tl.sum(qt[:, None] * S, 0)
            score += tl.sum(k_rows * qt[None, :], 1)
            own += qt * kt
            if (tile == 0) & (n < W - 1):
                tl.store(keys + (ring + n) * K + row, kt.to(keys.dtype.element_ty), mask=row_ok)
        v_rows = tl.load(
            values + ring * V + i[:, None] * V + column[None, :], mask=there[:, None] & column_ok[None, :], other=0.0
        ).to(tl.float32)
        y = total * old + tl.sum((score * weight)[:, None] * v_rows, 0) + tl.sum(own, 0) * vt
        tl.store(out + column, y.to(out.dtype.element_ty), mask=column_ok)
        if n < W - 1:
            tl.store(values + (ring + n) * V + column, vt.to(values.dtype.element_ty), mask=column_ok)
            if tile == 0:
                tl.store(logs + n, decay)
        else:  # rare: reading the state again is cheaper than keeping it in registers at every step
            weighted = v_rows * weight[:, None]
            for f0 in range(0, BK, FOLD):
                fold = f0 + tl.arange(0, FOLD)
                fold_ok = fold < K
                at = state + fold[:, None] * V + column[None, :]
                in_state = fold_ok[:, None] & column_ok[None, :]
                k_new = _rotated(k, fold, fold_ok, pair_cos, pair_sin, K, ROTARY)
                k_old = tl.load(
                    keys + ring * K + i[None, :] * K + fold[:, None], mask=fold_ok[:, None] & there[None, :], other=0.0
                ).to(tl.float32)
                held = tl.load(at, mask=in_state, other=0.0) * total + k_new[:, None] * vt[None, :]
                tl.store(at, tl.dot(k_old, weighted, held, input_precision="tf32x3"), mask=in_state)
