"""Causal depthwise convolution over W tokens with its activation on a GPU, forward and backward.

    pre_t = bias + sum_i weight_i x_{t - (W - 1) + i}        y_t = activation(pre_t)        i = 0 .. W - 1
    dpre_t = activation'(pre_t) dy_t
    dx_t = sum_i weight_i dpre_{t + (W - 1) - i} (+ dfinal for the last W - 1 tokens)
    dweight_i = sum_t dpre_t x_{t - (W - 1) + i}        dbias = sum_t dpre_t

A position below 0 is one of the `recent` inputs [N, W - 1, C] before the sequence, and its dx is drecent. The backward
computes pre again: nothing but x is kept for it.

The kernels are bound by memory. A program owns a segment of one sequence and a block of channels, and walks the tokens
in order with the last W - 1 inputs (and dpre) in registers: each row is read once, and each activation is computed
once, but for those before the segment. Token t completes dx_{t - (W - 1)}, so the segment that starts at s writes the
rows from s - (W - 1) on, and the last one of a sequence walks W - 1 tokens further. x and dy are read in place,
whatever the strides of their batch and tokens, and packed documents need no copies. One more program per sequence and
block writes the inputs that the next call needs, or drecent of a sequence without tokens. Sums over tokens are float32,
written per segment and added up in a fixed order (`sums.py`): no atomics.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.convolution.activation import activated, activation_gradient
from retnet.kernels.convolution.geometry import Geometry, geometry
from retnet.kernels.convolution.sums import add_up
from retnet.kernels.segments import Segments, segment_bounds, sequence_bounds, sequence_of


@dataclass(frozen=True)
class Convolution:
    """The inputs of one call as the kernels read them: x [B, T, C] with contiguous channels, weight [C, 1, W]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    recent: Tensor | None
    cu_seqlens: Tensor | None
    activation: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", _with_contiguous_channels(self.x))
        object.__setattr__(self, "weight", self.weight.contiguous())
        if self.recent is not None:
            object.__setattr__(self, "recent", self.recent.to(self.x.dtype).contiguous())

    @property
    def num_channels(self) -> int:
        return self.x.shape[2]

    @property
    def width(self) -> int:
        return self.weight.shape[2]

    @property
    def num_sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def tile(self, *, backward: bool) -> Geometry:
        tokens = self.x.shape[0] * self.x.shape[1]
        return geometry(self.x.dtype, self.width, tokens, self.num_channels, backward=backward)

    def segments(self, tile: Geometry) -> Segments:
        return Segments.of(*self.x.shape[:2], tile.segment, self.cu_seqlens)

    def launch(self, kernel, tile: Geometry, segments: Segments, *tensors: Tensor | None, rows: list[Tensor]) -> None:
        """Run a kernel over all segments and, after them, all sequences. rows: what is read in place by its strides."""
        programs = (segments.num_slots + segments.num_sequences) * triton.cdiv(self.num_channels, tile.channels)
        strides = [stride for x in rows for stride in x.stride()[:2]]
        unit = gcd(8, *strides)  # tells the compiler how rows are aligned
        if programs:
            kernel[(programs,)](
                self.x, self.weight, self.bias, self.recent, *tensors, segments.table, segments.cu_seqlens,
                segments.first_slot, segments.tokens_per_sequence, segments.num_slots, segments.num_sequences,
                *(stride // unit for stride in strides), UNIT=unit, C=self.num_channels, W=self.width,
                BC=tile.channels, L=tile.segment, ROWS=tile.rows, ACTIVATION=self.activation, PACKED=segments.packed,
                num_warps=tile.warps,
            )  # fmt: skip


def convolution_forward(call: Convolution, tile: Geometry | None = None) -> tuple[Tensor, Tensor]:
    """y [B, T, C] in x's dtype, and the inputs [N, W - 1, C] that a next call needs."""
    x, tile = call.x, tile or call.tile(backward=False)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(call.num_sequences, call.width - 1, call.num_channels, dtype=x.dtype, device=x.device)
    call.launch(_forward_kernel, tile, call.segments(tile), y, final, rows=[x])
    return y, final


def convolution_backward(
    call: Convolution, dy: Tensor, dfinal: Tensor | None, tile: Geometry | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [B, T, C] and drecent [N, W - 1, C] in x's dtype; dweight [C, 1, W] and dbias [C] in their tensors' dtypes."""
    x, W, tile = call.x, call.width, tile or call.tile(backward=True)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    drecent = torch.empty(call.num_sequences, W - 1, call.num_channels, dtype=x.dtype, device=x.device)
    segments = call.segments(tile)
    sums = torch.empty(segments.num_slots, W + 1, call.num_channels, dtype=torch.float32, device=x.device)
    dfinal, dy = None if dfinal is None else dfinal.contiguous(), _with_contiguous_channels(dy)
    call.launch(_backward_kernel, tile, segments, dy, dfinal, dx, drecent, sums, rows=[x, dy])
    dweight = torch.empty_like(call.weight)
    dbias = torch.empty(
        call.num_channels, dtype=torch.float32 if call.bias is None else call.bias.dtype, device=x.device
    )
    add_up(sums, dweight, dbias)
    return dx, dweight, dbias, drecent


def _with_contiguous_channels(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


@triton.jit
def _segment(slot, table, cu_seqlens, first_slot, T, num_sequences, L: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, its first token and length, the segment's first position in it and length, whether it is the last)."""
    token, count, is_last = segment_bounds(slot, table, T, L, PACKED)
    if PACKED:  # an unused slot is of the last sequence and has no tokens
        n = tl.minimum(sequence_of(slot, first_slot, num_sequences), num_sequences - 1)
    else:
        n = slot // tl.cdiv(T, L)
    start, length = _sequence(n, cu_seqlens, first_slot, T, L, PACKED)
    return n, start, length, (token - start).to(tl.int32), count, is_last


@triton.jit
def _sequence(n, cu_seqlens, first_slot, T, L: tl.constexpr, PACKED: tl.constexpr):
    """The first token of a sequence, and its length."""
    start, length, _, _ = sequence_bounds(n, cu_seqlens, first_slot, T, L, PACKED)
    return start, length


@triton.jit
def _sequence_pointer(x, n, start, batch, token, PACKED: tl.constexpr):
    """The first token of a sequence in x."""
    return x + (start * token if PACKED else n.to(tl.int64) * batch)


@triton.jit
def _load_row(pointer, row, end, stride, channel, channel_ok):
    """Row [BC] of a matrix, 0 where it is not in [0, end)."""
    rows = tl.zeros(channel.shape, tl.int32) + row
    ok = channel_ok & (rows >= 0) & (rows < end)
    return tl.load(pointer + tl.cast(row, tl.int64) * stride + channel, mask=ok, other=0.0)


@triton.jit
def _store_row(pointer, row, end, stride, channel, channel_ok, value):
    """Write a row if it is in [0, end)."""
    rows = tl.zeros(channel.shape, tl.int32) + row
    ok = channel_ok & (rows >= 0) & (rows < end)
    tl.store(pointer + tl.cast(row, tl.int64) * stride + channel, value.to(pointer.dtype.element_ty), mask=ok)


@triton.jit
def _input_row(x, recent, position, length, x_token, channel, channel_ok, C: tl.constexpr, W: tl.constexpr):
    """The input of a sequence at a position from -(W - 1) on, 0 elsewhere; x and recent begin with that sequence."""
    row = _load_row(x, position, length, x_token, channel, channel_ok)
    if recent is not None:
        row += _load_row(recent, position + (W - 1), W - 1, C, channel, channel_ok)
    return row


@triton.jit
def _taps(weight, bias, channel, channel_ok, W: tl.constexpr):
    """The W rows [BC] of the weight, and the bias, in float32."""
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.load(weight + channel * W + i, mask=channel_ok, other=0.0).to(tl.float32),)
    constant = tl.zeros(channel.shape, tl.float32)
    if bias is not None:
        constant += tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    return taps, constant


@triton.jit
def _convolved(constant, taps, rows, first: tl.constexpr, W: tl.constexpr):
    """The convolution over W rows from rows[first] on."""
    total = constant
    for i in tl.static_range(W):
        total += taps[i] * rows[first + i].to(tl.float32)
    return total


@triton.jit(do_not_specialize=["T", "num_slots", "num_sequences"])
def _forward_kernel(
    x, weight, bias, recent, y, final, table, cu_seqlens, first_slot, T, num_slots, num_sequences, x_batch, x_token,
    UNIT: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    index = tl.program_id(0) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    channel_ok = channel < C
    x_batch, x_token = tl.cast(x_batch, tl.int64) * UNIT, tl.cast(x_token, tl.int64) * UNIT
    if index < num_slots:
        n, start, length, first, count, _is_last = _segment(
            index, table, cu_seqlens, first_slot, T, num_sequences, L, PACKED
        )  # fmt: skip
        x = _sequence_pointer(x, n, start, x_batch, x_token, PACKED)
        if recent is not None:
            recent += n.to(tl.int64) * ((W - 1) * C)
        taps, constant = _taps(weight, bias, channel, channel_ok, W)
        past = ()
        for i in tl.static_range(W - 1):
            past = past + (_input_row(x, recent, first - (W - 1) + i, length, x_token, channel, channel_ok, C, W),)
        x += first.to(tl.int64) * x_token
        y += (start + first) * C
        for t in range(0, count, ROWS):
            rows = past
            for u in tl.static_range(ROWS):
                rows = rows + (_load_row(x, t + u, count, x_token, channel, channel_ok),)
            for u in tl.static_range(ROWS):
                out = activated(_convolved(constant, taps, rows, u, W), ACTIVATION)
                _store_row(y, t + u, count, C, channel, channel_ok, out)
            past = rows[ROWS:]
    else:
        n = index - num_slots
        start, length = _sequence(n, cu_seqlens, first_slot, T, L, PACKED)
        x = _sequence_pointer(x, n, start, x_batch, x_token, PACKED)
        if recent is not None:
            recent += n.to(tl.int64) * ((W - 1) * C)
        final += n.to(tl.int64) * ((W - 1) * C)
        for i in tl.static_range(W - 1):
            row = _input_row(x, recent, length - (W - 1) + i, length, x_token, channel, channel_ok, C, W)
            _store_row(final, i, W - 1, C, channel, channel_ok, row)


@triton.jit(do_not_specialize=["T", "num_slots", "num_sequences"])
def _backward_kernel(
    x, weight, bias, recent, dy, dfinal, dx, drecent, sums, table, cu_seqlens, first_slot, T, num_slots, num_sequences,
    x_batch, x_token, dy_batch, dy_token,
    UNIT: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    index = tl.program_id(0) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    channel_ok = channel < C
    x_batch, x_token = tl.cast(x_batch, tl.int64) * UNIT, tl.cast(x_token, tl.int64) * UNIT
    dy_batch, dy_token = tl.cast(dy_batch, tl.int64) * UNIT, tl.cast(dy_token, tl.int64) * UNIT
    if index < num_slots:
        n, start, length, first, count, is_last = _segment(
            index, table, cu_seqlens, first_slot, T, num_sequences, L, PACKED
        )  # fmt: skip
        past = n.to(tl.int64) * ((W - 1) * C)
        if recent is not None:
            recent += past
        if dfinal is not None:
            dfinal += past
        _segment_gradients(
            _sequence_pointer(x, n, start, x_batch, x_token, PACKED), weight, bias, recent,
            _sequence_pointer(dy, n, start, dy_batch, dy_token, PACKED), dfinal, dx + start * C, drecent + past,
            sums + index.to(tl.int64) * ((W + 1) * C), length, first, count, is_last, x_token, dy_token, channel,
            channel_ok, C, W, ROWS, ACTIVATION,
        )  # fmt: skip
    else:
        n = index - num_slots
        start, length = _sequence(n, cu_seqlens, first_slot, T, L, PACKED)
        past = n.to(tl.int64) * ((W - 1) * C)
        for i in tl.static_range(W - 1):
            passed = tl.zeros(channel.shape, tl.float32)
            if dfinal is not None:
                passed += _load_row(dfinal + past, i, W - 1, C, channel, channel_ok).to(tl.float32)
            _store_row(drecent + past, i, tl.where(length == 0, W - 1, 0), C, channel, channel_ok, passed)


@triton.jit
def _segment_gradients(
    x, weight, bias, recent, dy, dfinal, dx, drecent, sums, length, first, count, is_last, x_token, dy_token, channel,
    channel_ok, C: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dx (and drecent) of the W - 1 tokens before the segment and all of it but its last W - 1; the sums over it."""
    taps, constant = _taps(weight, bias, channel, channel_ok, W)
    before = ()
    for i in tl.static_range(2 * (W - 1)):
        before = before + (_input_row(x, recent, first - 2 * (W - 1) + i, length, x_token, channel, channel_ok, C, W),)
    last_dpre = ()
    for i in tl.static_range(W - 1):
        position = first - (W - 1) + i
        given = _load_row(dy, position, length, dy_token, channel, channel_ok).to(tl.float32)
        last_dpre = last_dpre + (activation_gradient(given, _convolved(constant, taps, before, i, W), ACTIVATION),)
    past = before[W - 1 :]
    dweight = ()
    for _ in tl.static_range(W):
        dweight = dweight + (tl.zeros(channel.shape, tl.float32),)
    dbias = tl.zeros(channel.shape, tl.float32)
    x += first.to(tl.int64) * x_token
    dy += first.to(tl.int64) * dy_token
    steps = count + tl.where(is_last, W - 1, 0)
    end = first + steps - (W - 1)
    past_end = tl.minimum(end + (W - 1), W - 1)
    for t in range(0, steps, ROWS):
        rows, given_rows = past, ()
        for u in tl.static_range(ROWS):
            rows = rows + (_load_row(x, t + u, count, x_token, channel, channel_ok),)
            given_rows = given_rows + (_load_row(dy, t + u, count, dy_token, channel, channel_ok),)
        dpre = last_dpre
        for u in tl.static_range(ROWS):
            own = activation_gradient(given_rows[u].to(tl.float32), _convolved(constant, taps, rows, u, W), ACTIVATION)
            dpre = dpre + (own,)
            dbias += own
            added = ()
            for i in tl.static_range(W):
                added = added + (dweight[i] + own * rows[u + i].to(tl.float32),)
            dweight = added
            total = tl.zeros(channel.shape, tl.float32)
            for i in tl.static_range(W):
                total += taps[i] * dpre[u + (W - 1) - i]
            position = first + t + u - (W - 1)
            if dfinal is not None:
                kept = position - length + (W - 1)
                total += _load_row(dfinal, kept, W - 1, C, channel, channel_ok).to(tl.float32)
            _store_row(dx, position, end, C, channel, channel_ok, total)
            _store_row(drecent, position + (W - 1), past_end, C, channel, channel_ok, total)
        past, last_dpre = rows[ROWS:], dpre[ROWS:]
    for i in tl.static_range(W):
        _store_row(sums, i, W, C, channel, channel_ok, dweight[i])
    _store_row(sums, W, W + 1, C, channel, channel_ok, dbias)
