"""Chains the states of a sequence's parts: from what each part adds by itself to the state it starts from.

    start_0 = initial,   start_{n+1} = gamma^{length_n} start_n + own_n       (in reverse, from the last part down)

In place over [B, H, parts, K, V] in float32; a few parts, so one program loops over them for its piece of the state.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "part", "parts"])
def carry_kernel(
    states, initial, log_decay, tokens, part, parts, heads, SIZE,
    HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states [B, H, parts, SIZE] own -> start, initial [B, H, SIZE]. Grid: B * H, ceil(SIZE / BLOCK)."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    rate = tl.maximum(tl.load(log_decay + row % heads), -1e30)
    start = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_INITIAL:
        start = tl.load(initial + row.to(tl.int64) * SIZE + at, mask=inside)
    for step in range(parts):
        n = parts - 1 - step if REVERSE else step
        pointers = states + (row.to(tl.int64) * parts + n) * SIZE + at
        own = tl.load(pointers, mask=inside)
        tl.store(pointers, start, mask=inside)
        length = tl.minimum(part, tokens - n * part)
        start = tl.exp(rate * length.to(tl.float32)) * start + own
