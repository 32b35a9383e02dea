"""The states that the parts of a sequence start from, given what each part adds by itself.

    start_0 = initial,   start_{n+1} = kept_n start_n + own_n       (in reverse, from the last part down)

kept_n is gamma to the number of tokens of part n, or the product of its tokens' decays; 0 where a packed document ends
in the part. The states, float32 [B, H, parts, K, V], are replaced in place. A program chains one block of one head's
state.
"""

import triton
import triton.language as tl

from retnet.kernels.chain import chain_states


@triton.jit
def _unmasked_tokens(codes, first, end, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The unmasked tokens of chunks first..end, and whether one document spans them all (`token_codes`)."""
    count = 0
    for i in range(first, end, BLOCK):
        chunk = i + tl.arange(0, BLOCK)
        count += tl.sum(tl.load(codes + (chunk + 1) * CHUNK - 1, mask=chunk < end, other=0) & 127, 0)
    entered = tl.load(codes + tl.maximum(first * CHUNK - 1, 0))
    left = tl.load(codes + end * CHUNK - 1)
    return count, (entered ^ (entered >> 31)) >> 8 == (left ^ (left >> 31)) >> 8


@triton.jit
def _total(sums, first, end, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The log2 decay of chunks first..end (`token_sums`)."""
    total = 0.0
    for i in range(first, end, BLOCK):
        chunk = i + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(sums + (chunk + 1) * CHUNK - 1, mask=chunk < end, other=0.0), 0)
    return total


@triton.jit
def _kept(
    n, there, rate, codes, sums, tokens, part_chunks, parts,
    HAS_CODES: tl.constexpr, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The decay of the part that the chain visits n-th."""
    n = tl.where(there, n, 0)
    part = parts - 1 - n if REVERSE else n
    first = part * part_chunks
    end = tl.minimum(first + part_chunks, tl.cdiv(tokens, CHUNK))
    if PER_TOKEN:
        return tl.exp2(_total(sums, first, end, CHUNK, 64))
    if HAS_CODES:
        count, whole = _unmasked_tokens(codes, first, end, CHUNK, 64)
        return tl.where(whole, tl.exp(rate * count.to(tl.float32)), 0.0)
    count = tl.minimum(end * CHUNK, tokens) - first * CHUNK
    return tl.exp(rate * count.to(tl.float32))


@triton.jit
def _keep(state, kept):
    return kept * state


@triton.jit(do_not_specialize=["tokens", "part_chunks", "parts"])
def part_starts_kernel(
    states, initial, log_decay, codes, sums, tokens, part_chunks, parts, heads, SIZE,
    HAS_INITIAL: tl.constexpr, HAS_CODES: tl.constexpr, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states [B, H, parts, SIZE] own -> start, initial [B, H, SIZE]. Grid: B * H, ceil(SIZE / BLOCK)."""
    head = tl.program_id(0)  # of all sequences
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rate = tl.maximum(tl.load(log_decay + head % heads), -1e30)
    start = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_INITIAL:
        start = tl.load(initial + head.to(tl.int64) * SIZE + cell, mask=cell < SIZE)
    first = head.to(tl.int64) * parts + (parts - 1 if REVERSE else 0)
    padded = tl.cdiv(tokens, CHUNK) * CHUNK
    sequence_codes = codes + (head // heads).to(tl.int64) * padded
    sequence_sums = sums + head.to(tl.int64) * padded
    chain_states(
        start, states + first * SIZE, cell, cell < SIZE, -SIZE if REVERSE else SIZE,
        parts, parts - 1,  # what the last part adds was not computed
        _kept,
        (rate, sequence_codes, sequence_sums, tokens, part_chunks, parts, HAS_CODES, PER_TOKEN, REVERSE, CHUNK),
        _keep, (),
    )  # fmt: skip
