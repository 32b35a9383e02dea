"""Segments of a batch: where each one starts, and its length.

A sequence of T tokens has ceil(T / L) segments of L tokens, the last one shorter. Every segment has a slot, counted
through the batch: slot s of a batch [B, T] belongs to sequence s // ceil(T / L). Packed sequences (`cu_seqlens`) have a
slot table that is built on the device, because their lengths are never read on the host. It has ceil(T / L) + N slots,
which is always enough; a slot that no sequence needs has length 0. Tokens are counted through the batch too: b T + t.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch


@dataclass(frozen=True)
class Segments:
    """N sequences in `num_slots` segments of `length` tokens.

    `table` [slots, 4] int32 (start, length, is last, 0) and `first_slot` [N + 1] int32 exist for packed sequences only.
    """

    num_sequences: int
    num_tokens: int
    tokens_per_sequence: int  # unread for packed sequences
    length: int
    num_slots: int
    cu_seqlens: Tensor | None
    table: Tensor | None
    first_slot: Tensor | None

    @classmethod
    def of(cls, batch: int, tokens: int, length: int, cu_seqlens: Tensor | None) -> "Segments":
        if cu_seqlens is None:
            num_slots = batch * triton.cdiv(tokens, length)
            return cls(batch, batch * tokens, tokens, length, num_slots, None, None, None)
        cu_seqlens = cu_seqlens.contiguous()
        num_sequences = cu_seqlens.shape[0] - 1
        num_slots = triton.cdiv(tokens, length) + num_sequences
        table = torch.zeros(num_slots, 4, dtype=torch.int32, device=cu_seqlens.device)
        first_slot = torch.zeros(num_sequences + 1, dtype=torch.int32, device=cu_seqlens.device)
        if num_sequences > 0:
            launch(_first_slot_kernel, (1,), cu_seqlens, first_slot, num_sequences, L=length, BLOCK=1024)
            launch(_slot_table_kernel, (num_sequences,), cu_seqlens, first_slot, table, L=length, BLOCK=128)
        return cls(num_sequences, tokens, tokens, length, num_slots, cu_seqlens, table, first_slot)

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
    """The table's entries of one sequence. Grid: N."""
    n = tl.program_id(0)
    start = tl.load(cu_seqlens + n).to(tl.int32)
    end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    slot = tl.load(first + n)
    count = tl.load(first + n + 1) - slot
    for s0 in range(0, count, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        ok = s < count
        entry = table + 4 * (slot + s)
        tl.store(entry, start + s * L, mask=ok)
        tl.store(entry + 1, tl.minimum(end - start - s * L, L), mask=ok)
        tl.store(entry + 2, (s == count - 1).to(tl.int32), mask=ok)


@triton.jit
def segment_bounds(slot, table, T, L: tl.constexpr, PACKED: tl.constexpr):
    """The first token of a slot's segment, its number of tokens, and whether it is the last of its sequence."""
    if PACKED:
        start = tl.load(table + 4 * slot).to(tl.int64)
        length = tl.load(table + 4 * slot + 1)
        is_last = tl.load(table + 4 * slot + 2) != 0
    else:
        count = tl.cdiv(T, L)
        s = slot % count
        start = (slot // count).to(tl.int64) * T + s * L
        length = tl.minimum(T - s * L, L)
        is_last = s == count - 1
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
    """The packed sequence that a slot belongs to: the number of sequences whose slots end at or before it."""
    low, high = 0, num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(first_slot + middle + 1) <= slot:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def head_pointer(pointer, start, head, stride, head_stride):
    """Pointer to one head at index `start` of the leading axis. A head's stride may span a sequence: 64 bits."""
    return pointer + start * stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def state_of(states, index, head, H: tl.constexpr, SIZE: tl.constexpr):
    """Pointer to one head's state of `SIZE` numbers in states [., H, SIZE]."""
    return states + (tl.cast(index, tl.int64) * H + head) * SIZE


@triton.jit
def load_tile(pointer, rows, columns, row_stride, row_ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A [rows, columns] tile of a row-major matrix: zero where a row is not ok or a column is past WIDTH.

    Columns are visited BLOCK at a time: where BLOCK divides WIDTH, none can be past it.
    """
    at = pointer + rows[:, None] * row_stride + columns[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(at, mask=row_ok[:, None], other=0.0)
    return tl.load(at, mask=row_ok[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def tokens_ok(mask, start, position, length, MASKED: tl.constexpr):
    """Which positions of a segment hold a token that is not masked out."""
    ok = position < length
    if MASKED:
        ok = ok & (tl.load(mask + start + position, mask=ok, other=0) != 0)
    return ok
