"""Per-token codes for masks and document boundaries.

One int32 per token, [B, chunks * CHUNK] with the last chunk padded:

    document << 8 | special << 7 | count

`document` is the number of the token's document, complemented for a masked token. `count` is the number of unmasked
tokens of the chunk through this one: the decay between two tokens is gamma to the difference of their counts. `special`
is the same in all tokens of a chunk: whether the chunk has a masked token, contains a document boundary or starts at
one. A walk treats every other chunk as if there were neither mask nor packing. The codes are shared by all heads, and
no length is read on the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch
from retnet.kernels.retention.hopper.warp_roles import CHUNK


def token_codes(B: int, T: int, mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """The codes [B, ceil(T / CHUNK) * CHUNK] of mask [B, T] bool, or of cu_seqlens [N + 1] with B = 1."""
    chunks = triton.cdiv(T, CHUNK)
    codes = torch.empty(B, chunks * CHUNK, dtype=torch.int32, device=device)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    launch(
        _token_codes_kernel,
        (B * chunks,),
        codes,
        codes if mask is None else mask.contiguous().view(torch.uint8),
        codes if cu_seqlens is None else cu_seqlens,
        T,
        documents,
        documents.bit_length(),
        MASKED=mask is not None,
        C=CHUNK,
        num_warps=2,
    )
    return codes


@triton.jit
def document_of(token, cu_seqlens, documents, steps):
    """The document of each token: the number of documents that end at or before it, by bisection."""
    low = token * 0
    high = low + documents
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        ended = tl.load(cu_seqlens + middle + 1, mask=open_, other=0) <= token
        low = tl.where(open_ & ended, middle + 1, low)
        high = tl.where(open_ & ~ended, middle, high)
    return low


@triton.jit(do_not_specialize=["tokens", "documents", "steps"])
def _token_codes_kernel(codes, mask, cu_seqlens, tokens, documents, steps, MASKED: tl.constexpr, C: tl.constexpr):
    chunks = tl.cdiv(tokens, C)
    sequence = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * C
    token = first + tl.arange(0, C)
    real = token < tokens
    if MASKED:
        real = real & (tl.load(mask + sequence.to(tl.int64) * tokens + token, mask=real, other=0) != 0)
    document = document_of(tl.minimum(token, tokens - 1), cu_seqlens, documents, steps)
    before = document_of(tl.maximum(first - 1 + tl.arange(0, C) * 0, 0), cu_seqlens, documents, steps)
    special = (tl.min(real.to(tl.int32), 0) == 0) | (tl.max(document, 0) != tl.max(before, 0))
    code = tl.where(real, document, ~document)
    code = (code << 8) | (special.to(tl.int32) << 7) | tl.cumsum(real.to(tl.int32), 0)
    tl.store(codes + sequence.to(tl.int64) * chunks * C + token, code)
