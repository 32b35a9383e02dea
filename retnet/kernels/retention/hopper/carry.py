"""Chains the states of a sequence's parts: from what each part adds by itself to the state it starts from.

    start_0 = initial,   start_{n+1} = kept_n start_n + own_n       (in reverse, from the last part down)

kept_n is gamma to the number of part n's tokens; 0 where a packed document ends in it. In place over
[B, H, parts, K, V] in float32; a few parts, so one program loops over them for its piece of the state.
"""

import triton
import triton.language as tl


@triton.jit
def _placed_tokens(places, first, end, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Unmasked tokens of chunks first..end, and whether all of them follow one document (`walk_places`)."""
    count = 0
    for i in range(first, end, BLOCK):
        chunk = i + tl.arange(0, BLOCK)
        count += tl.sum(tl.load(places + (chunk + 1) * CHUNK - 1, mask=chunk < end, other=0) & 127, 0)
    entered = tl.load(places + tl.maximum(first * CHUNK - 1, 0))
    left = tl.load(places + end * CHUNK - 1)
    return count, (entered ^ (entered >> 31)) >> 8 == (left ^ (left >> 31)) >> 8


@triton.jit(do_not_specialize=["tokens", "part_chunks", "parts"])
def carry_kernel(
    states, initial, log_decay, places, tokens, part_chunks, parts, heads, SIZE,
    HAS_INITIAL: tl.constexpr, PLACED: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states [B, H, parts, SIZE] own -> start, initial [B, H, SIZE]. Grid: B * H, ceil(SIZE / BLOCK)."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    rate = tl.maximum(tl.load(log_decay + row % heads), -1e30)
    chunks = tl.cdiv(tokens, CHUNK)
    start = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_INITIAL:
        start = tl.load(initial + row.to(tl.int64) * SIZE + at, mask=inside)
    for step in range(parts):
        n = parts - 1 - step if REVERSE else step
        pointers = states + (row.to(tl.int64) * parts + n) * SIZE + at
        own = tl.load(pointers, mask=at < tl.where(step < parts - 1, SIZE, 0), other=0.0)  # the last part has none
        tl.store(pointers, start, mask=inside)
        first = n * part_chunks
        end = tl.minimum(first + part_chunks, chunks)
        if PLACED:
            row_places = places + (row // heads).to(tl.int64) * chunks * CHUNK
            count, whole = _placed_tokens(row_places, first, end, CHUNK, 64)
            kept = tl.where(whole, tl.exp(rate * count.to(tl.float32)), 0.0)
        else:
            count = tl.minimum(end * CHUNK, tokens) - first * CHUNK
            kept = tl.exp(rate * count.to(tl.float32))
        start = kept * start + own
