"""dK and dV in one reversed walk, for small heads.

Both come from the gradient dS of the state that a chunk leaves behind, and from the same q, k, v and dO. Per chunk of L
tokens, with readers r and writers w (`walk_kernel` computes the same in two walks):

    dV_w = end_w k_w dS   + sum_r pair_rw (q_r . k_w) dO_r
    dK_w = end_w v_w dS^T + sum_r pair_rw (dO_r . v_w) q_r        dS' = gamma^L dS + sum_r start_r q_r^T dO_r

With heads of 64 x 128 a walk is limited by memory traffic, and this one reads the inputs once for both gradients: 160
us on an H200 against 203 for two walks (B, T, H = 8, 4096, 16). One warpgroup holds dS, both outputs and the scores in
registers, hence the small heads. Loads run ahead in three stages.

Whole chunks only, without mask and packing: TMA reads x as a matrix [B T, H K], and a chunk must not reach into the
next sequence. Everything else is left to two walks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from retnet.kernels.recording import launch
from retnet.kernels.retention.hopper.warp_roles import CHUNK

KEYS = 64
VALUES = (64, 128)

_LOG2_E = tl.constexpr(1.4426950408889634)


def fits_dk_dv(T: int, K: int, V: int) -> bool:
    """Whether one walk makes both gradients for sequences of T tokens and heads of [K, V]."""
    return T % CHUNK == 0 and K == KEYS and V in VALUES


def dk_dv_supported(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> bool:
    """Whether tensors [B, T, H, K] and [B, T, H, V] have the sizes and strides that one walk needs."""
    return fits_dk_dv(q.shape[1], q.shape[3], v.shape[3]) and all(map(_is_matrix, (q, k, v, dout)))


def _is_matrix(x: Tensor) -> bool:
    """Whether x [B, T, H, width] is a matrix with B T rows and the heads of a token side by side."""
    B, T, H, width = x.shape
    batch, token, head, feature = x.stride()
    return feature == 1 and (H == 1 or head == width) and (B == 1 or batch == T * token)


def walk_dk_dv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    log_decay: Tensor,
    scale: float,
    starts: Tensor | None,
    factors: Tensor | None = None,
    *,
    parts: int,
    part_chunks: int,
    need_dstate: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv, and the gradient [B, H, K, V] of the initial state if `need_dstate`.

    starts [B, H, parts, K, V] float32: dS after the last token of each part of `part_chunks` chunks (None: zeros).
    factors [H] of a float16 dS (`state_factors`): starts and dstate are multiplied by them.
    """
    (B, T, H, K), V = q.shape, v.shape[3]
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    dstate = torch.empty(B, H, K, V, dtype=torch.float32, device=q.device) if need_dstate else None
    launch(
        dk_dv_kernel,
        (B * H * parts,),
        *map(_matrix, (q, k, v, dout, dk, dv)),
        log_decay,
        scale,
        starts,
        dstate,
        factors,
        T,
        H,
        parts,
        part_chunks,
        K=K,
        V=V,
        C=CHUNK,
        num_warps=4,
        num_stages=3,
    )
    return dk, dv, dstate


def _matrix(x: Tensor) -> TensorDescriptor:
    """A descriptor of x [B, T, H, width] as a matrix, in tiles of [CHUNK tokens, width]."""
    B, T, H, width = x.shape
    return TensorDescriptor(x, [B * T, H * width], [x.stride(1), 1], [CHUNK, width])


@triton.jit(do_not_specialize=["tokens", "parts", "part_chunks"])
def dk_dv_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, log_decay, scale, starts, dstate, factors,
    tokens, heads, parts, part_chunks, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid: B * H * parts."""
    dtype: tl.constexpr = v_desc.dtype
    state_index = tl.program_id(0)
    part = state_index % parts
    sequence_head = state_index // parts
    batch = sequence_head // heads
    head = sequence_head % heads
    log2_gamma = tl.maximum(tl.load(log_decay + head) * _LOG2_E, -1e30)  # finite, so that gamma = 0 gives 0^0 = 1
    position = tl.arange(0, C)
    distance = (position[None, :] - position[:, None]).to(tl.float32)  # [writer, reader]
    pair = tl.where(distance >= 0, tl.exp2(log2_gamma * tl.maximum(distance, 0.0)) * scale, 0.0)
    end = tl.exp2(log2_gamma * (C - 1 - position).to(tl.float32))
    start = tl.exp2(log2_gamma * (position + 1).to(tl.float32)) * scale
    keep = tl.exp2(log2_gamma * C)
    if factors is not None:
        factor = tl.load(factors + head)
        end /= factor
        start *= factor

    cell = tl.arange(0, K)[:, None] * V + tl.arange(0, V)[None, :]
    dstate_after = tl.zeros([K, V], tl.float32)
    if starts is not None:
        dstate_after += tl.load(starts + state_index.to(tl.int64) * (K * V) + cell)
    first = part * part_chunks
    last = tl.minimum(first + part_chunks, tokens // C) - 1
    for step in range(last - first + 1):
        token = batch * tokens + (last - step) * C
        k = k_desc.load([token, head * K])
        q = q_desc.load([token, head * K])
        dout = dout_desc.load([token, head * V])
        v = v_desc.load([token, head * V])
        after = dstate_after.to(dtype)
        readers = tl.trans(q)
        dv = tl.dot(k, after) * end[:, None]
        dv = tl.dot((tl.dot(k, readers) * pair).to(dtype), dout, dv)
        dv_desc.store([token, head * V], dv.to(dtype))
        dk = tl.dot(v, tl.trans(after)) * end[:, None]
        dk = tl.dot((tl.dot(v, tl.trans(dout)) * pair).to(dtype), q, dk)
        dk_desc.store([token, head * K], dk.to(dtype))
        dstate_after = tl.dot((readers * start[None, :]).to(dtype), dout, dstate_after * keep)
    if dstate is not None and part == 0:
        tl.store(dstate + sequence_head.to(tl.int64) * (K * V) + cell, dstate_after)
