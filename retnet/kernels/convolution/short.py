"""Causal depthwise convolution over W tokens on a GPU, with the tokens before a sequence as its state.

    y_t = bias + sum_i weight_i x_{t - (W - 1) + i}                          i = 0 .. W - 1
    dx_t = sum_i weight_i dy_{t + (W - 1) - i} (+ dfinal for the last W - 1 tokens)
    dweight_i = sum_t dy_t x_{t - (W - 1) + i}        dbias = sum_t dy_t

A position below 0 is one of the `recent` inputs [N, W - 1, C] before the sequence, and its dx is drecent. A program
owns one segment of a sequence and a block of channels; x is read in place, whatever the strides of its batch and
tokens, and packed documents need no copies. One more program per sequence and block writes the inputs that the next
call needs, or drecent. Sums are float32. Those over tokens are written per segment and added up by torch in a fixed
order: no atomics. The kernels are bound by memory; of the W reads of a tile, all but one hit the cache.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.segments import Segments, segment_bounds, sequence_bounds, sequence_of

SEGMENT = 64  # tokens per program
CHANNELS = 64  # channels per program, at most


@dataclass(frozen=True)
class Convolution:
    """The inputs of one call as the kernels read them: x [B, T, C] with contiguous channels, weight [C, W]."""

    x: Tensor
    weight: Tensor
    recent: Tensor | None
    segments: Segments

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, recent: Tensor | None, cu_seqlens: Tensor | None) -> "Convolution":
        B, T, _ = x.shape
        x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
        recent = None if recent is None else recent.to(x.dtype).contiguous()
        return cls(x, weight[:, 0].contiguous(), recent, Segments.of(B, T, SEGMENT, cu_seqlens))

    @property
    def num_channels(self) -> int:
        return self.x.shape[2]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def launch(self, kernel, *tensors: Tensor | None) -> None:
        """Run a kernel over all segments and, after them, all sequences."""
        segments, C, W = self.segments, self.num_channels, self.width
        BC = min(CHANNELS, triton.next_power_of_2(C))
        programs = (segments.num_slots + segments.num_sequences) * triton.cdiv(C, BC)
        if programs:
            kernel[(programs,)](
                self.x, self.weight, self.recent, *tensors, segments.table, segments.cu_seqlens, segments.first_slot,
                segments.tokens_per_sequence, segments.num_slots, segments.num_sequences, *self.x.stride()[:2],
                C=C, W=W, PAST=triton.next_power_of_2(W - 1), BC=BC, L=SEGMENT, PACKED=segments.packed, num_warps=4,
            )  # fmt: skip


def convolution_forward(call: Convolution, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, T, C], and the inputs [N, W - 1, C] that a next call needs."""
    x = call.x
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, call.weight.dtype), device=x.device)
    final = torch.empty(call.segments.num_sequences, call.width - 1, call.num_channels, dtype=x.dtype, device=x.device)
    call.launch(_forward_kernel, bias, y, final)
    return y, final


def convolution_backward(call: Convolution, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [B, T, C] and drecent [N, W - 1, C] in x's dtype, dweight [C, W] and dbias [C] in float32."""
    x, segments, W = call.x, call.segments, call.width
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    drecent = torch.empty(segments.num_sequences, W - 1, call.num_channels, dtype=x.dtype, device=x.device)
    sums = torch.empty(segments.num_slots, W + 1, call.num_channels, dtype=torch.float32, device=x.device)
    dfinal = None if dfinal is None else dfinal.contiguous()
    call.launch(_backward_kernel, dy.contiguous(), dfinal, dx, drecent, sums)
    *dweight, dbias = sums.sum(0)
    return dx, torch.stack(dweight, 1), dbias, drecent


@triton.jit
def _segment(slot, table, cu_seqlens, first_slot, T, num_sequences, L: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, its first token, its length, the segment's first position in it, the segment's length)."""
    token, segment_length, _ = segment_bounds(slot, table, T, L, PACKED)
    if PACKED:  # an unused slot is of the last sequence and has no tokens
        n = tl.minimum(sequence_of(slot, first_slot, num_sequences), num_sequences - 1)
    else:
        n = slot // tl.cdiv(T, L)
    start, length, _, _ = sequence_bounds(n, cu_seqlens, first_slot, T, L, PACKED)
    return n, start, length, token - start, segment_length


@triton.jit
def _load_rows(pointer, position, stride, channel, ok, channel_ok):
    """Rows [positions, BC] in float32, 0 where a position is not ok."""
    at = pointer + position.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(at, mask=ok[:, None] & channel_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_rows(pointer, row, stride, channel, ok, channel_ok, value):
    at = pointer + row.to(tl.int64)[:, None] * stride + channel[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=ok[:, None] & channel_ok[None, :])


@triton.jit
def _inputs(x, recent, n, position, length, x_token, channel, channel_ok, ok, C: tl.constexpr, W: tl.constexpr):
    """The inputs [positions, BC] of sequence n, whose first token is at x; positions from -(W - 1) on."""
    value = _load_rows(x, position, x_token, channel, ok & (position >= 0) & (position < length), channel_ok)
    if recent is not None:
        past = recent + n.to(tl.int64) * ((W - 1) * C)
        value += _load_rows(past, position + W - 1, C, channel, ok & (position < 0), channel_ok)
    return value


@triton.jit
def _sequence_pointer(x, n, start, x_batch, x_token, PACKED: tl.constexpr):
    """The first token of a sequence in x."""
    return x + (start * x_token if PACKED else n.to(tl.int64) * x_batch)


@triton.jit(do_not_specialize=["T", "num_slots", "num_sequences"])
def _forward_kernel(
    x, weight, recent, bias, y, final, table, cu_seqlens, first_slot, T, num_slots, num_sequences, x_batch, x_token,
    C: tl.constexpr, W: tl.constexpr, PAST: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    index = tl.program_id(0) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    if index < num_slots:
        n, start, length, first, count = _segment(
            index, table, cu_seqlens, first_slot, T, num_sequences, L, PACKED
        )  # fmt: skip
        x = _sequence_pointer(x, n, start, x_batch, x_token, PACKED)
        _outputs(x, weight, recent, n, bias, y + start * C, length, first, count, x_token, channel, C, W, BC, L)
    else:
        n = index - num_slots
        start, length, _, _ = sequence_bounds(n, cu_seqlens, first_slot, T, L, PACKED)
        x = _sequence_pointer(x, n, start, x_batch, x_token, PACKED)
        _last_inputs(x, recent, n, final, length, x_token, channel, C, W, PAST)


@triton.jit
def _outputs(
    x, weight, recent, n, bias, y, length, first, count, x_token, channel,
    C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    place, channel_ok = tl.arange(0, L), channel < C
    position, ok = first + place, place < count
    total = tl.zeros([L, BC], tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(W):
        tap = tl.load(weight + channel * W + i, mask=channel_ok, other=0.0).to(tl.float32)
        read = position - (W - 1 - i)
        total += tap[None, :] * _inputs(x, recent, n, read, length, x_token, channel, channel_ok, ok, C, W)
    _store_rows(y, position, C, channel, ok, channel_ok, total)


@triton.jit
def _last_inputs(
    x, recent, n, final, length, x_token, channel, C: tl.constexpr, W: tl.constexpr, PAST: tl.constexpr
):  # fmt: skip
    """The inputs that the next call needs."""
    place, channel_ok = tl.arange(0, PAST), channel < C
    ok = place < W - 1
    last = _inputs(x, recent, n, length - (W - 1) + place, length, x_token, channel, channel_ok, ok, C, W)
    _store_rows(final + n.to(tl.int64) * ((W - 1) * C), place, C, channel, ok, channel_ok, last)


@triton.jit(do_not_specialize=["T", "num_slots", "num_sequences"])
def _backward_kernel(
    x, weight, recent, dy, dfinal, dx, drecent, sums, table, cu_seqlens, first_slot, T, num_slots, num_sequences,
    x_batch, x_token,
    C: tl.constexpr, W: tl.constexpr, PAST: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    index = tl.program_id(0) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    channel_ok = channel < C
    if index < num_slots:
        n, start, length, first, count = _segment(
            index, table, cu_seqlens, first_slot, T, num_sequences, L, PACKED
        )  # fmt: skip
        x = _sequence_pointer(x, n, start, x_batch, x_token, PACKED)
        place = tl.arange(0, L)
        _store_input_gradients(
            dy + start * C, dfinal, n, weight, dx + start * C, first + place, first + place, length, channel,
            place < count, C, W, BC,
        )  # fmt: skip
        into = sums + index.to(tl.int64) * ((W + 1) * C) + channel
        own = _load_rows(dy + start * C, first + place, C, channel, place < count, channel_ok)
        tl.store(into + W * C, tl.sum(own, 0), mask=channel_ok)
        for i in tl.static_range(W):
            read = first + place - (W - 1 - i)
            given = _inputs(x, recent, n, read, length, x_token, channel, channel_ok, place < count, C, W)
            tl.store(into + i * C, tl.sum(own * given, 0), mask=channel_ok)
    else:
        n = index - num_slots
        start, length, _, _ = sequence_bounds(n, cu_seqlens, first_slot, T, L, PACKED)
        before = tl.arange(0, PAST)
        _store_input_gradients(
            dy + start * C, dfinal, n, weight, drecent + n.to(tl.int64) * ((W - 1) * C), before, before - (W - 1),
            length, channel, before < W - 1, C, W, BC,
        )  # fmt: skip


@triton.jit
def _store_input_gradients(
    dy, dfinal, n, weight, out, row, position, length, channel, ok, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The gradients of the inputs at these positions of a sequence, from -(W - 1) on, into rows of `out`."""
    channel_ok = channel < C
    total = tl.zeros([position.shape[0], BC], tl.float32)
    for i in tl.static_range(W):
        tap = tl.load(weight + channel * W + i, mask=channel_ok, other=0.0).to(tl.float32)
        reader = position + (W - 1 - i)
        total += tap[None, :] * _load_rows(dy, reader, C, channel, ok & (reader >= 0) & (reader < length), channel_ok)
    if dfinal is not None:
        kept, last = position - length + (W - 1), dfinal + n.to(tl.int64) * ((W - 1) * C)
        total += _load_rows(last, kept, C, channel, ok & (kept >= 0) & (kept < W - 1), channel_ok)
    _store_rows(out, row, C, channel, ok, channel_ok, total)
