"""Recurrent retention for decoding: one or a few tokens (paper Eq. 6), with the state updated in place.

    S <- exp(log_decay_t) S + k_t^T v_t        out_t = scale q_t S

Reading and writing states takes nearly all the time. A program owns BV values of one head's state with all of K, so
that no sum crosses programs. For one token, the slice passes through registers in slabs of rows, and the next slab
loads while one is computed. For several tokens, the slice stays in float32 registers, read once and written once.

A state narrower than float32 is rounded stochastically: to nearest, a decay above
1 - 2^-9 would leave a bfloat16 state unchanged and nothing would be forgotten. The random bits are a hash of the call's
q and k, the value and its position, so equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.decode.recurrence import advance
from retnet.kernels.device import power_of_two
from retnet.kernels.retention.problem import RetentionProblem
from retnet.kernels.retention.tiles import StepTile, step_tile
from retnet.kernels.segments import head_pointer

# Bits of a float32 significand that a narrower dtype drops.
DROPPED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def retention_step(problem: RetentionProblem, state: Tensor, tile: StepTile | None = None) -> Tensor:
    """T tokens of every row: `state` [B, H, K, V] is updated (the problem's is not read); out [B, T, H, V]."""
    q, k, v, log_decay, mask = problem.q, problem.k, problem.v, problem.log_decay, problem.mask
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    if state.dtype not in DROPPED_BITS:
        raise TypeError(f"state is {state.dtype}; accepted on a GPU: {', '.join(map(str, DROPPED_BITS))}")
    strides = [stride if size > 1 else None for size, stride in zip(state.shape, state.stride(), strict=True)]
    if strides[3] not in (None, 1) or strides[2] not in (None, V) or 0 in strides[:2]:
        raise ValueError(
            f"state has strides {state.stride()}; accepted: [K, V] of each head contiguous and its own, to be updated "
            "in place"
        )
    out = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    tile = tile or step_tile(K, V, B * H, state.dtype, T)
    _step_kernel[(B * H * triton.cdiv(V, tile.BV),)](
        q, k, v, log_decay.contiguous(), state, None if mask is None else mask.contiguous().view(torch.uint8), out, T,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *state.stride()[:2], problem.scale,
        H=H, HEADS_PER_GROUP=H // G, K=K, V=V, BK=power_of_two(K), BV=tile.BV, SLAB=min(tile.slab, power_of_two(K)),
        PER_TOKEN=log_decay.dim() == 3, MASKED=mask is not None, DROPPED_BITS=DROPPED_BITS[state.dtype],
        ONE_TOKEN=T == 1, num_warps=tile.warps,
    )  # fmt: skip
    return out


def retention_recurrent(problem: RetentionProblem, state_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, the state [B, H, K, V] after the last token in `state_dtype`); the given state is left as it was."""
    device, state = problem.v.device, problem.state
    if state is None:
        final = torch.zeros(problem.state_shape, dtype=torch.float32, device=device)
    else:  # the state is not rounded before it is read
        as_given = state.dtype == state_dtype and state_dtype in DROPPED_BITS
        dtype = state_dtype if as_given else torch.float32
        final = torch.empty(problem.state_shape, dtype=dtype, device=device).copy_(state)
    return retention_step(problem, final), final.to(state_dtype)


@triton.jit(do_not_specialize=["T", "q_batch", "k_batch", "v_batch"])
def _step_kernel(
    q, k, v, log_decay, state, mask, out, T,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, state_batch, state_head, scale,
    H: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SLAB: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
    DROPPED_BITS: tl.constexpr, ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    V_TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    h = (pid // V_TILES) % H
    b = (pid // (V_TILES * H)).to(tl.int64)
    columns = pid % V_TILES * BV + tl.arange(0, BV)
    state += b * state_batch + h * state_head
    q = head_pointer(q, b, h // HEADS_PER_GROUP, q_batch, q_head)
    k = head_pointer(k, b, h // HEADS_PER_GROUP, k_batch, k_head)
    v = head_pointer(v, b, h, v_batch, v_head)
    log_decay += (b * T * H if PER_TOKEN else 0) + h
    out += (b * T * H + h) * V
    if MASKED:
        mask += b * T
    if ONE_TOKEN:
        _one_token(q, k, v, log_decay, state, mask, out, columns, scale, K, V, BK, BV, SLAB, MASKED, DROPPED_BITS)
    else:
        _tokens(
            q, k, v, log_decay, state, mask, out, T, columns, (q_token, k_token, v_token), scale,
            H, K, V, BK, PER_TOKEN, MASKED, DROPPED_BITS,
        )  # fmt: skip


@triton.jit
def _one_token(
    q, k, v, log_decay, state, mask, out, columns, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLAB: tl.constexpr,
    MASKED: tl.constexpr, DROPPED_BITS: tl.constexpr,
):  # fmt: skip
    """One token, the state in slabs [SLAB, BV]. A masked token leaves the state as it is."""
    step, v_ok, limit = tl.load(log_decay), columns < V, K
    if MASKED:
        alive = tl.load(mask) != 0
        step, limit = tl.where(alive, step, 0.0), tl.where(alive, K, 0)
    vt = tl.load(v + columns, mask=v_ok, other=0.0).to(tl.float32)
    seed = 0
    if DROPPED_BITS > 0:
        rows = tl.arange(0, BK)
        bits = tl.load(k + rows, mask=rows < limit, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
        bits += tl.load(q + rows, mask=rows < limit, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
        seed = tl.sum(bits, 0)
    total = tl.zeros([SLAB, BV], dtype=tl.float32)
    slab = _load_slab(state, 0, columns, K, V, SLAB)
    for r0 in tl.static_range(0, BK, SLAB):
        S = slab
        if r0 + SLAB < BK:
            slab = _load_slab(state, r0 + SLAB, columns, K, V, SLAB)
        rows = r0 + tl.arange(0, SLAB)
        qt = tl.load(q + rows, mask=rows < limit, other=0.0).to(tl.float32) * scale
        kt = tl.load(k + rows, mask=rows < limit, other=0.0).to(tl.float32)
        S = advance(S, step, kt, vt)
        total += qt[:, None] * S
        _store_state(state, S, rows, columns, seed, K, V, DROPPED_BITS)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=v_ok)


@triton.jit
def _tokens(
    q, k, v, log_decay, state, mask, out, T, columns, strides, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PER_TOKEN: tl.constexpr, MASKED: tl.constexpr, DROPPED_BITS: tl.constexpr,
):  # fmt: skip
    """T tokens, the state [BK, BV] in registers."""
    q_token, k_token, v_token = strides
    rows = tl.arange(0, BK)
    row_ok, column_ok = rows < K, columns < V
    S = _load_slab(state, 0, columns, K, V, BK).to(tl.float32)
    seed = tl.zeros([BK], dtype=tl.int32)
    for _ in range(T):
        k_ok, v_ok = row_ok, column_ok
        step = tl.load(log_decay)
        if MASKED:
            alive = tl.load(mask) != 0
            k_ok, v_ok = tl.where(alive, rows, K) < K, tl.where(alive, columns, V) < V
            step = tl.where(alive, step, 0.0)
            mask += 1
        qt = tl.load(q + rows, mask=k_ok, other=0.0).to(tl.float32) * scale
        kt = tl.load(k + rows, mask=k_ok, other=0.0).to(tl.float32)
        vt = tl.load(v + columns, mask=v_ok, other=0.0).to(tl.float32)
        S = advance(S, step, kt, vt)
        tl.store(out + columns, tl.sum(qt[:, None] * S, 0).to(out.dtype.element_ty), mask=column_ok)
        q, k, v, out = q + q_token, k + k_token, v + v_token, out + H * V
        if PER_TOKEN:
            log_decay += H
        if DROPPED_BITS > 0:
            seed = seed * 31 + kt.to(tl.int32, bitcast=True) + qt.to(tl.int32, bitcast=True)
    _store_state(state, S, rows, columns, tl.sum(seed, 0), K, V, DROPPED_BITS)


@triton.jit
def _load_slab(state, r0, columns, K: tl.constexpr, V: tl.constexpr, SLAB: tl.constexpr):
    rows = r0 + tl.arange(0, SLAB)
    return tl.load(
        state + rows[:, None] * V + columns[None, :], mask=(rows < K)[:, None] & (columns < V)[None, :], other=0.0
    )


@triton.jit
def _store_state(state, S, rows, columns, seed, K: tl.constexpr, V: tl.constexpr, DROPPED_BITS: tl.constexpr):
    cell = rows[:, None] * V + columns[None, :]
    if DROPPED_BITS > 0:
        S = _round_stochastically(S, cell, seed, DROPPED_BITS)
    tl.store(state + cell, S.to(state.dtype.element_ty), mask=(rows < K)[:, None] & (columns < V)[None, :])


@triton.jit
def _round_stochastically(x, place, seed, DROPPED_BITS: tl.constexpr):
    """x rounded up or down to the kept bits, with probabilities by distance: unbiased."""
    # The seed is mixed once per program; over many calls, it makes the noise of every value uniform.
    seed = seed.to(tl.uint32, bitcast=True)
    seed = (seed ^ (seed >> 16)) * 0x7FEB352D
    seed = (seed ^ (seed >> 15)) * 0x46D9F3B3
    seed = seed ^ (seed >> 16)
    bits = x.to(tl.uint32, bitcast=True)
    noise = (bits * 0x2C1B3C6D + place.to(tl.uint32, bitcast=True) * 0x27D4EB2D + seed) >> (32 - DROPPED_BITS)
    kept = (bits + noise) & (0xFFFFFFFF - ((1 << DROPPED_BITS) - 1))
    return kept.to(tl.float32, bitcast=True)
