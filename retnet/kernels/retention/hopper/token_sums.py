"""Running sums of the log decays of a chunk's tokens, from which a walk makes the factors of a decay per token.

    sums_t = log2 of the product of the decays from the chunk's first token through t

Sums never leave a chunk of 64 tokens. A decay below 2^-160 counts as 2^-160, which float32 rounds to 0: a hard reset,
whose logarithm is finite, so that differences of sums are numbers. A masked token does not decay, nor do the tokens
that fill the last chunk. The first token of a packed document is a hard reset, masked or not: no walk with documents
has initial states, and so nothing else keeps a document from the next one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch
from retnet.kernels.retention.hopper.token_codes import document_of
from retnet.kernels.retention.hopper.warp_roles import CHUNK

_LOG2_E = tl.constexpr(1.4426950408889634)
_RESET = tl.constexpr(-160.0)


def token_sums(log_decay: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """sums [B, H, ceil(T / CHUNK) * CHUNK] float32 of log_decay [B, T, H] (natural log), mask [B, T] bool and
    cu_seqlens [N + 1] (then B = 1)."""
    B, T, H = log_decay.shape
    chunks, block = triton.cdiv(T, CHUNK), min(16, triton.next_power_of_2(H))
    sums = torch.empty(B, H, chunks * CHUNK, dtype=torch.float32, device=log_decay.device)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    launch(
        _token_sums_kernel, (B * chunks, triton.cdiv(H, block)),
        log_decay, None if mask is None else mask.contiguous().view(torch.uint8), cu_seqlens, sums,
        T, documents, documents.bit_length(), *log_decay.stride(), H=H, C=CHUNK, BLOCK=block, num_warps=2,
    )  # fmt: skip
    return sums


@triton.jit
def is_reset(through, before):
    """Whether the token between two running sums is a hard reset."""
    return through - before < 1.0 + _RESET


@triton.jit(do_not_specialize=["tokens", "documents", "steps"])
def _token_sums_kernel(
    log_decay, mask, cu_seqlens, sums, tokens, documents, steps, batch_stride, token_stride, head_stride,
    H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: B * chunks, blocks of heads."""
    chunks = tl.cdiv(tokens, C)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    token = tl.program_id(0) % chunks * C + tl.arange(0, C)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = token < tokens
    decays = real
    if mask is not None:
        decays = real & (tl.load(mask + batch * tokens + token, mask=real, other=0) != 0)
    rows = log_decay + batch * batch_stride + token.to(tl.int64)[:, None] * token_stride
    each = tl.load(rows + head[None, :] * head_stride, mask=decays[:, None] & (head < H)[None, :], other=0.0)
    each = tl.maximum(each * _LOG2_E, _RESET, propagate_nan=tl.PropagateNan.ALL)
    if cu_seqlens is not None:
        document = document_of(tl.minimum(token, tokens - 1), cu_seqlens, documents, steps)
        opens = real & (tl.load(cu_seqlens + document) == token)
        each = tl.where(opens[:, None], _RESET, each)
    through = tl.cumsum(each, 0)
    place = (batch * H + head[None, :]) * (chunks * C) + token[:, None]
    tl.store(sums + place, through, mask=(head < H)[None, :])
