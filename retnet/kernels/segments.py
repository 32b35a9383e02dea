"""How a batch is cut into segments: the one place that knows where a segment starts and how long it is.

A sequence of T tokens is cut into ceil(T / L) segments of L tokens, the last one ragged. Every segment of the batch has
a slot, in order; slot s of a batch [B, T] is row s // ceil(T / L). Packed sequences (`cu_seqlens`) have a slot table
that is built on the device, since their lengths are never read on the host: ceil(T / L) + N slots always suffice, and
one that no sequence needs has length 0. Token numbers count through the whole batch, b T + t.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """N sequences in `num_slots` segments of L tokens. `table` [slots, 4] int32 (start, length, is last, 0) and
    `first_slot` [N + 1] int32 exist for packed sequences alone."""

    num_sequences: int
    num_tokens: int
    tokens_per_row: int
    segment: int
    num_slots: int
    cu_seqlens: Tensor | None
    table: Tensor | None
    first_slot: Tensor | None

    @classmethod
    def of(cls, batch: int, tokens: int, segment: int, cu_seqlens: Tensor | None) -> "Segments":
        if cu_seqlens is None:
            num_slots = batch * triton.cdiv(tokens, segment)
            return cls(batch, batch * tokens, tokens, segment, num_slots, None, None, None)
        cu_seqlens = cu_seqlens.contiguous()
        num_sequences = cu_seqlens.shape[0] - 1
        num_slots = triton.cdiv(tokens, segment) + num_sequences
        table = torch.zeros(num_slots, 4, dtype=torch.int32, device=cu_seqlens.device)
        first = torch.zeros(num_sequences + 1, dtype=torch.int32, device=cu_seqlens.device)
        if num_sequences > 0:
            _first_slot_kernel[(1,)](cu_seqlens, first, num_sequences, L=segment, BLOCK=1024)
            _slot_table_kernel[(num_sequences,)](cu_seqlens, first, table, L=segment, BLOCK=128)
        return cls(num_sequences, tokens, tokens, segment, num_slots, cu_seqlens, table, first)

    @property
    def packed(self) -> bool:
        return self.table is not None


@triton.jit(do_not_specialize=["num_sequences"])
def _first_slot_kernel(cu_seqlens, first, num_sequences, L: tl.constexpr, BLOCK: tl.constexpr):
    """first[n] = sum of ceil(length / L) over the sequences before n; first[N] is the number of slots in use."""
    before = 0
    for n0 in range(0, num_sequences, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        ok = n < num_sequences
        length = tl.load(cu_seqlens + n + 1, mask=ok, other=0) - tl.load(cu_seqlens + n, mask=ok, other=0)
        segments = ((length + L - 1) // L).to(tl.int32)
        tl.store(first + n + 1, before + tl.cumsum(segments, 0), mask=ok)
        before += tl.sum(segments, 0)


@triton.jit
def _slot_table_kernel(cu_seqlens, first, table, L: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    start = tl.load(cu_seqlens + n).to(tl.int32)
    end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    slot = tl.load(first + n)
    count = tl.load(first + n + 1) - slot
    for s0 in range(0, count, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        ok = s < count
        row = table + 4 * (slot + s)
        tl.store(row, start + s * L, mask=ok)
        tl.store(row + 1, tl.minimum(end - start - s * L, L), mask=ok)
        tl.store(row + 2, (s == count - 1).to(tl.int32), mask=ok)


@triton.jit
def segment_bounds(slot, table, T, L: tl.constexpr, PACKED: tl.constexpr):
    """The first token, the number of tokens, and whether the segment is its sequence's last, of one slot."""
    if PACKED:
        start = tl.load(table + 4 * slot).to(tl.int64)
        length = tl.load(table + 4 * slot + 1)
        is_last = tl.load(table + 4 * slot + 2) != 0
    else:
        per_row = tl.cdiv(T, L)
        s = slot % per_row
        start = (slot // per_row).to(tl.int64) * T + s * L
        length = tl.minimum(T - s * L, L)
        is_last = s == per_row - 1
    return start, length, is_last


@triton.jit
def sequence_bounds(n, cu_seqlens, first_slot, T, L: tl.constexpr, PACKED: tl.constexpr):
    """The first token, the number of tokens, the first slot and the number of slots of sequence n."""
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
        slot = tl.load(first_slot + n)
        count = tl.load(first_slot + n + 1) - slot
    else:
        start = n.to(tl.int64) * T
        length = T
        count = tl.cdiv(T, L)
        slot = n * count
    return start, length, slot, count


@triton.jit
def sequence_of(slot, first_slot, num_sequences):
    """The sequence that has this slot: the number of sequences that end at or before it."""
    low, high = 0, num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(first_slot + middle + 1) <= slot:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def head_rows(pointer, start, head, row_stride, head_stride):
    """The rows of one head from row `start` on. A head's stride may be a whole sequence long: 64 bits."""
    return pointer + start * row_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def state_of(states, row, head, H: tl.constexpr, SIZE: tl.constexpr):
    """One head's state of `SIZE` cells among states [rows, H, SIZE]."""
    return states + (tl.cast(row, tl.int64) * H + head) * SIZE


@triton.jit
def load_tile(pointer, rows, columns, row_stride, row_ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A [rows, columns] tile of a row-major matrix, zero where a row is not ok or a column lies past WIDTH.

    BLOCK is the step in which columns are visited: where it divides WIDTH, no column can lie past it.
    """
    at = pointer + rows[:, None] * row_stride + columns[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(at, mask=row_ok[:, None], other=0.0)
    return tl.load(at, mask=row_ok[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def tokens_ok(mask, start, position, length, MASKED: tl.constexpr):
    """Which tokens of a segment are there and not masked out."""
    ok = position < length
    if MASKED:
        ok = ok & (tl.load(mask + start + position, mask=ok, other=0) != 0)
    return ok
