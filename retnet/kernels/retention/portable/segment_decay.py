"""Products of decays inside a segment: fixed, fixed under a mask, or per token.

With a fixed decay a product over tokens is a power: only the number of real tokens matters. Per token, running sums of
log decays start at the segment's first token and are kept in two floats, since a single sum would lose the digits of
small decays beside large ones: `high` sums multiples of 2^-9, exactly, and `low` sums the rest. In float32, exp() below
-104 is 0: such a token is a hard reset, which is counted and not summed. Two tokens with a reset between them have the
product 0.

    enter_t = product of the decays from the segment's first token through t: what is left of the state before it
    leave_t = product of the decays after t through its last token: what a write at t becomes
    between(t, s) = product of the decays of the tokens s < i <= t

Only differences <= 0 are exponentiated. Stored in float32: per token [5, H, tokens] (high, low, resets, enter, leave);
for a fixed decay under a mask [2, tokens] (real tokens through t, and after t); for a fixed decay nothing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.recording import launch
from retnet.kernels.segments import Segments, segment_bounds, tokens_ok


@dataclass(frozen=True)
class SegmentDecay:
    """The decay as kernels take it: `rate` [H], the fixed log decay (unread if the decay is per token), and `sums`, the
    stored numbers listed above (unread for a fixed decay without a mask)."""

    rate: Tensor
    sums: Tensor
    mask: Tensor | None
    per_token: bool

    @classmethod
    def of(cls, log_decay: Tensor, mask: Tensor | None, segments: Segments) -> "SegmentDecay":
        per_token, heads = log_decay.dim() == 3, log_decay.shape[-1]
        log_decay = log_decay.contiguous()
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        sums = log_decay
        if per_token:
            sums = torch.empty(5, heads, segments.num_tokens, dtype=torch.float32, device=log_decay.device)
        elif mask is not None:
            sums = torch.empty(2, segments.num_tokens, dtype=torch.float32, device=log_decay.device)
        if sums is not log_decay and segments.num_slots > 0:
            launch(
                _running_sums_kernel,
                (segments.num_slots, heads if per_token else 1),
                log_decay,
                mask,
                sums,
                segments.table,
                segments.tokens_per_sequence,
                segments.num_tokens,
                H=heads,
                L=segments.length,
                PER_TOKEN=per_token,
                MASKED=mask is not None,
                PACKED=segments.packed,
                num_warps=4 if segments.length >= 128 else 2,
            )
        return cls(log_decay, sums, mask, per_token)


@triton.jit(do_not_specialize=["T", "num_tokens"])
def _running_sums_kernel(
    log_decay,
    mask,
    sums,
    table,
    T,
    num_tokens,
    H: tl.constexpr,
    L: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    slot, h = tl.program_id(0), tl.program_id(1)
    start, length, _ = segment_bounds(slot, table, T, L, PACKED)
    position = tl.arange(0, L)
    inside = position < length
    ok = tokens_ok(mask, start, position, length, MASKED)
    plane = num_tokens.to(tl.int64)
    if PER_TOKEN:
        at = sums + h * plane + start + position
        plane = H * plane
        step = tl.load(log_decay + (start + position) * H + h, mask=ok, other=0.0)
        reset = step < -104.0
        step = tl.where(reset, 0.0, step)
        coarse = tl.ceil(step * 512.0) / 512.0  # towards 0: slow decays lie in `low` alone
        high, low = tl.cumsum(coarse, 0), tl.cumsum(step - coarse, 0)
        resets = tl.cumsum(reset.to(tl.float32), 0)
        leave = (tl.sum(coarse, 0) - high) + (tl.sum(step - coarse, 0) - low)
        leave = tl.where(resets == tl.sum(reset.to(tl.float32), 0), tl.exp(tl.minimum(leave, 0.0)), 0.0)
        tl.store(at, high, mask=inside)
        tl.store(at + plane, low, mask=inside)
        tl.store(at + 2 * plane, resets, mask=inside)
        tl.store(at + 3 * plane, tl.where(resets == 0.0, tl.exp(high + low), 0.0), mask=inside)
        tl.store(at + 4 * plane, leave, mask=inside)
    else:
        through = tl.cumsum(ok.to(tl.float32), 0)
        tl.store(sums + start + position, through, mask=inside)
        tl.store(sums + plane + start + position, tl.sum(ok.to(tl.float32), 0) - through, mask=inside)


@triton.jit
def decay_of_head(rate, sums, num_tokens, h, start, H: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr):
    """(log decay, sums at the segment's first token, stride between the sums' planes) of one head.

    A log decay of -inf would turn an empty product into 0 x -inf; -1000 gives a decay of 0 as well.
    """
    plane = num_tokens.to(tl.int64)
    log_decay = 0.0
    if PER_TOKEN:
        sums += h * plane + start
        plane = H * plane
    else:
        log_decay = tl.maximum(tl.load(rate + h), -1000.0)
        if MASKED:
            sums += start
    return log_decay, sums, plane


@triton.jit
def running(sums, plane, position, length, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr):
    """The running sum through each position: (high, low, resets). For a fixed decay, `high` is a number of tokens."""
    if PER_TOKEN:
        ok = position < length
        high = tl.load(sums + position, mask=ok, other=0.0)
        low = tl.load(sums + plane + position, mask=ok, other=0.0)
        return high, low, tl.load(sums + 2 * plane + position, mask=ok, other=0.0)
    if MASKED:
        high = tl.load(sums + position, mask=position < length, other=0.0)
    else:
        high = (position + 1).to(tl.float32)
    return high, high, high


@triton.jit
def between(log_decay, later, earlier, SWAP: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Product of the decays from an earlier running sum to a later one; SWAP exchanges the two.

    The exponent of two tokens in the wrong order is clipped to 0: the product is never more than 1.
    """
    if SWAP:
        later, earlier = earlier, later
    if PER_TOKEN:
        exponent = (later[0] - earlier[0]) + (later[1] - earlier[1])
        return tl.where(later[2] == earlier[2], tl.exp(tl.minimum(exponent, 0.0)), 0.0)
    return tl.exp(tl.minimum((later[0] - earlier[0]) * log_decay, 0.0))


@triton.jit
def between_all(log_decay, rows, columns, SWAP: tl.constexpr, PER_TOKEN: tl.constexpr):
    """`between` of all pairs of two vectors of running sums: [rows, columns]."""
    rows = (rows[0][:, None], rows[1][:, None], rows[2][:, None])
    columns = (columns[0][None, :], columns[1][None, :], columns[2][None, :])
    return between(log_decay, rows, columns, SWAP, PER_TOKEN)


@triton.jit
def enter(log_decay, sums, plane, position, length, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr):
    if PER_TOKEN:
        return tl.load(sums + 3 * plane + position, mask=position < length, other=0.0)
    high, _, _ = running(sums, plane, position, length, PER_TOKEN, MASKED)
    return tl.exp(high * log_decay)


@triton.jit
def enter_exponent(log_decay, sums, plane, last, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr):
    """The log of the product of all decays of segments with these `last` tokens; far below 0 after a reset."""
    high, low, resets = running(sums, plane, last, last + 1, PER_TOKEN, MASKED)
    if PER_TOKEN:
        return tl.where(resets == 0.0, high + low, -1000.0)
    return high * log_decay


@triton.jit
def leave(log_decay, sums, plane, position, length, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr):
    if PER_TOKEN:
        return tl.load(sums + 4 * plane + position, mask=position < length, other=0.0)
    if MASKED:
        remaining = tl.load(sums + plane + position, mask=position < length, other=0.0)
    else:
        remaining = tl.maximum(length - 1 - position, 0).to(tl.float32)
    return tl.exp(remaining * log_decay)
