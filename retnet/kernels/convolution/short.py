"""Causal depthwise convolution over W tokens with its activation on a GPU, forward and backward.

    pre_t = bias + sum_i weight_i x_{t - (W - 1) + i}        y_t = activation(pre_t)        i = 0 .. W - 1
    dpre_t = activation'(pre_t) dy_t
    dx_t = sum_i weight_i dpre_{t + (W - 1) - i} (+ dfinal for the last W - 1 tokens)
    dweight_i = sum_t dpre_t x_{t - (W - 1) + i}        dbias = sum_t dpre_t

A position below 0 is one of the `recent` inputs [N, W - 1, C] before the sequence, and its dx is drecent. The backward
computes pre again: nothing but x is kept for it.

The kernels are bound by memory. A program owns a segment of one sequence and a block of channels, and walks the tokens
in order with the last W - 1 inputs (and dpre) in registers: each row is read once, and each activation is computed
once, but for those beside the segment. Token t completes dx_{t - (W - 1)}, so the backward walks W - 1 tokens further.
Most steps touch only rows that exist, and check nothing; the steps at the end check each row. x and dy are read in
place, whatever the strides of their batch and tokens, and packed documents need no copies. One more program per
sequence and block writes the inputs that the next call needs, or drecent of a sequence without tokens. Sums over tokens
are float32, written per segment and added up in a fixed order (`sums.py`): no atomics.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.architectures import architecture
from retnet.kernels.convolution.activation import activated, activation_gradient, per_unit
from retnet.kernels.convolution.geometry import Geometry, geometry
from retnet.kernels.convolution.sums import add_up
from retnet.kernels.recording import launch
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
        hardware = architecture(self.x.device)
        return geometry(self.width, tokens, self.num_channels, backward=backward, hardware=hardware)

    def segments(self, tile: Geometry) -> Segments:
        return Segments.of(*self.x.shape[:2], tile.segment, self.cu_seqlens)

    def run(self, kernel, tile: Geometry, segments: Segments, *tensors: Tensor | None, rows: list[Tensor]) -> None:
        """Run a kernel over all segments and, after them, all sequences. rows: what is read in place by its strides."""
        programs = (segments.num_slots + segments.num_sequences) * triton.cdiv(self.num_channels, tile.channels)
        strides = [stride for x in rows for stride in x.stride()[:2]]
        unit = gcd(8, *strides)  # tells the compiler how rows are aligned
        if programs:
            launch(
                kernel, (programs,),
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
    call.run(_forward_kernel, tile, call.segments(tile), y, final, rows=[x])
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
    call.run(_backward_kernel, tile, segments, dy, dfinal, dx, drecent, sums, rows=[x, dy])
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
    """(sequence, its first token and length, the segment's first position in it and length)."""
    token, count, _is_last = segment_bounds(slot, table, T, L, PACKED)
    if PACKED:  # an unused slot is of the last sequence and has no tokens
        n = tl.minimum(sequence_of(slot, first_slot, num_sequences), num_sequences - 1)
    else:
        n = slot // tl.cdiv(T, L)
    start, length = _sequence(n, cu_seqlens, first_slot, T, L, PACKED)
    return n, start, length, (token - start).to(tl.int32), count


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
def _channels(C: tl.constexpr, BC: tl.constexpr):
    """The channels of a program, and which of them exist. A whole block needs no mask."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    channel = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    if C % BC == 0:
        return channel, tl.full([BC], True, tl.int1)
    return channel, channel < C


@triton.jit
def _widened(row):
    """float32. A bfloat16 is its upper half: one instruction on a word of two, where a conversion takes two."""
    if row.dtype == tl.bfloat16:
        return (row.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return row.to(tl.float32)


@triton.jit
def _in_range(row, end, channel, channel_ok):
    rows = tl.zeros(channel.shape, tl.int32) + row
    return channel_ok & (rows >= 0) & (rows < end)


@triton.jit
def _load_row(pointer, row, end, stride, channel, channel_ok):
    """Row [BC] of a matrix, 0 where it is not in [0, end)."""
    ok = _in_range(row, end, channel, channel_ok)
    return tl.load(pointer + tl.cast(row, tl.int64) * stride + channel, mask=ok, other=0.0)


@triton.jit
def _store_row(pointer, row, end, stride, channel, channel_ok, value):
    """Write a row if it is in [0, end)."""
    ok = _in_range(row, end, channel, channel_ok)
    tl.store(pointer + tl.cast(row, tl.int64) * stride + channel, value.to(pointer.dtype.element_ty), mask=ok)


@triton.jit
def _load_rows(pointer, row, end, stride, channel, channel_ok, ROWS: tl.constexpr, CHECKED: tl.constexpr):
    """ROWS rows from a row on; those that are not checked are all there."""
    rows = ()
    pointer += tl.cast(row, tl.int64) * stride
    for u in tl.static_range(ROWS):
        if CHECKED:
            rows = rows + (_load_row(pointer, u, end - row, stride, channel, channel_ok),)
        else:
            rows = rows + (tl.load(pointer + tl.cast(u, tl.int64) * stride + channel, mask=channel_ok, other=0.0),)
    return rows


@triton.jit
def _input_row(x, recent, position, length, x_token, channel, channel_ok, C: tl.constexpr, W: tl.constexpr):
    """The input of a sequence at a position from -(W - 1) on, 0 elsewhere; x and recent begin with that sequence."""
    row = _load_row(x, position, length, x_token, channel, channel_ok)
    if recent is not None:
        row += _load_row(recent, position + (W - 1), W - 1, C, channel, channel_ok)
    return row


@triton.jit
def _past(x, recent, first, length, x_token, channel, channel_ok, C: tl.constexpr, W: tl.constexpr):
    """The W - 1 inputs before a position, in float32."""
    rows = ()
    for i in tl.static_range(W - 1):
        row = _input_row(x, recent, first - (W - 1) + i, length, x_token, channel, channel_ok, C, W)
        rows = rows + (_widened(row),)
    return rows


@triton.jit
def _taps(weight, bias, channel, channel_ok, W: tl.constexpr, ACTIVATION: tl.constexpr):
    """The W rows [BC] of the weight, and the bias, in float32 and in the activation's units."""
    taps = ()
    for i in tl.static_range(W):
        tap = tl.load(weight + channel * W + i, mask=channel_ok, other=0.0).to(tl.float32)
        taps = taps + (per_unit(tap, ACTIVATION),)
    constant = tl.zeros(channel.shape, tl.float32)
    if bias is not None:
        constant += tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    return taps, per_unit(constant, ACTIVATION)


@triton.jit
def _convolved(constant, taps, rows, first: tl.constexpr, W: tl.constexpr):
    """The convolution over W rows from rows[first] on."""
    total = constant
    for i in tl.static_range(W):
        total += taps[i] * rows[first + i]
    return total


@triton.jit(do_not_specialize=["T", "num_slots", "num_sequences"])
def _forward_kernel(
    x, weight, bias, recent, y, final, table, cu_seqlens, first_slot, T, num_slots, num_sequences, x_batch, x_token,
    UNIT: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) // ((C + BC - 1) // BC)
    channel, channel_ok = _channels(C, BC)
    x_batch, x_token = tl.cast(x_batch, tl.int64) * UNIT, tl.cast(x_token, tl.int64) * UNIT
    if index < num_slots:
        n, start, length, first, count = _segment(index, table, cu_seqlens, first_slot, T, num_sequences, L, PACKED)
        x = _sequence_pointer(x, n, start, x_batch, x_token, PACKED)
        if recent is not None:
            recent += n.to(tl.int64) * ((W - 1) * C)
        taps, constant = _taps(weight, bias, channel, channel_ok, W, ACTIVATION)
        past = _past(x, recent, first, length, x_token, channel, channel_ok, C, W)
        x += first.to(tl.int64) * x_token
        y += (start + first) * C
        whole = count // ROWS * ROWS
        for t in range(0, whole, ROWS):
            past = _outputs(
                x, y, past, taps, constant, t, count, x_token, channel, channel_ok, C, W, ROWS, ACTIVATION, False
            )  # fmt: skip
        if whole < count:
            _outputs(
                x, y, past, taps, constant, whole, count, x_token, channel, channel_ok, C, W, ROWS, ACTIVATION, True
            )  # fmt: skip
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


@triton.jit
def _outputs(
    x, y, past, taps, constant, t, count, x_token, channel, channel_ok, C: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of y from t on; the W - 1 inputs before the next ones."""
    rows, loaded = past, _load_rows(x, t, count, x_token, channel, channel_ok, ROWS, CHECKED)
    y += tl.cast(t, tl.int64) * C
    for u in tl.static_range(ROWS):
        rows = rows + (_widened(loaded[u]),)
        out = activated(_convolved(constant, taps, rows, u, W), ACTIVATION)
        _write(y, u, count - t, C, channel, channel_ok, out, CHECKED)
    return rows[ROWS:]


@triton.jit
def _write(pointer, row, end, stride, channel, channel_ok, value, CHECKED: tl.constexpr):
    """Write a row, if it is before the end; one that is not checked is."""
    if CHECKED:
        _store_row(pointer, row, end, stride, channel, channel_ok, value)
    else:
        tl.store(pointer + row * stride + channel, value.to(pointer.dtype.element_ty), mask=channel_ok)


@triton.jit(do_not_specialize=["T", "num_slots", "num_sequences"])
def _backward_kernel(
    x, weight, bias, recent, dy, dfinal, dx, drecent, sums, table, cu_seqlens, first_slot, T, num_slots, num_sequences,
    x_batch, x_token, dy_batch, dy_token,
    UNIT: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) // ((C + BC - 1) // BC)
    channel, channel_ok = _channels(C, BC)
    x_batch, x_token = tl.cast(x_batch, tl.int64) * UNIT, tl.cast(x_token, tl.int64) * UNIT
    dy_batch, dy_token = tl.cast(dy_batch, tl.int64) * UNIT, tl.cast(dy_token, tl.int64) * UNIT
    if index < num_slots:
        n, start, length, first, count = _segment(index, table, cu_seqlens, first_slot, T, num_sequences, L, PACKED)
        past = n.to(tl.int64) * ((W - 1) * C)
        if recent is not None:
            recent += past
        if dfinal is not None:
            dfinal += past
        _segment_gradients(
            _sequence_pointer(x, n, start, x_batch, x_token, PACKED), weight, bias, recent,
            _sequence_pointer(dy, n, start, dy_batch, dy_token, PACKED), dfinal, dx + start * C, drecent + past,
            sums + index.to(tl.int64) * ((W + 1) * C), length, first, count, x_token, dy_token, channel,
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
    x, weight, bias, recent, dy, dfinal, dx, drecent, sums, length, first, count, x_token, dy_token, channel,
    channel_ok, C: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dx of a segment, drecent of the sequence that starts with it, and the sums over it."""
    taps, constant = _taps(weight, bias, channel, channel_ok, W, ACTIVATION)
    past = _past(x, recent, first, length, x_token, channel, channel_ok, C, W)
    sums_of = ()
    for _ in tl.static_range(W + 1):
        sums_of = sums_of + (tl.zeros(channel.shape, tl.float32),)
    x += first.to(tl.int64) * x_token
    dy += first.to(tl.int64) * dy_token
    dx += first.to(tl.int64) * C
    left = length - first  # tokens of the sequence from the segment's first on
    rows, given = past, _load_rows(dy, 0, left, dy_token, channel, channel_ok, W - 1, True)
    loaded = _load_rows(x, 0, left, x_token, channel, channel_ok, W - 1, True)
    dpre = ()
    for u in tl.static_range(W - 1):
        rows = rows + (_widened(loaded[u]),)
        own = activation_gradient(_widened(given[u]), _convolved(constant, taps, rows, u, W), ACTIVATION)
        dpre = dpre + (own,)
        sums_of = _added(sums_of, tl.where(u < count, own, 0.0), rows, u, W)
    rows = rows[W - 1 :]
    _past_gradients(drecent, dfinal, dpre, taps, length, first, count, channel, channel_ok, C, W)
    whole = tl.maximum(count - (W - 1), 0) // ROWS * ROWS
    for t in range(0, whole, ROWS):
        rows, dpre, sums_of = _row_gradients(
            x, dy, dfinal, dx, rows, dpre, sums_of, taps, constant, t, count, left, x_token, dy_token, channel,
            channel_ok, C, W, ROWS, ACTIVATION, False,
        )  # fmt: skip
    for t in range(whole, count, ROWS):
        rows, dpre, sums_of = _row_gradients(
            x, dy, dfinal, dx, rows, dpre, sums_of, taps, constant, t, count, left, x_token, dy_token, channel,
            channel_ok, C, W, ROWS, ACTIVATION, True,
        )  # fmt: skip
    for i in tl.static_range(W + 1):
        _store_row(sums, i, W + 1, C, channel, channel_ok, per_unit(sums_of[i], ACTIVATION))


@triton.jit
def _added(sums_of, dpre, rows, first: tl.constexpr, W: tl.constexpr):
    """The sums for the taps and, last, the bias, with those of one token, whose first input is rows[first]."""
    added = ()
    for i in tl.static_range(W):
        added = added + (sums_of[i] + dpre * rows[first + i],)
    return added + (sums_of[W] + dpre,)


@triton.jit
def _past_gradients(
    drecent, dfinal, dpre, taps, length, first, count, channel, channel_ok, C: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Write drecent if the segment is the first of its sequence. dpre: of the segment's first W - 1 tokens."""
    end = tl.where((first == 0) & (count > 0), W - 1, 0)
    for j in tl.static_range(W - 1):
        total = tl.zeros(channel.shape, tl.float32)
        for i in tl.static_range(j + 1):
            total += taps[i] * dpre[j - i]
        if dfinal is not None:  # of a sequence of fewer tokens than that
            total += _load_row(dfinal, j - length, tl.where(end > 0, W - 1, 0), C, channel, channel_ok).to(tl.float32)
        _store_row(drecent, j, end, C, channel, channel_ok, total)


@triton.jit
def _row_gradients(
    x, dy, dfinal, dx, rows, dpre, sums_of, taps, constant, t, count, left, x_token, dy_token, channel, channel_ok,
    C: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Write dx of ROWS rows from t on, which end with the dpre of the tokens W - 1 further, and add to the sums.

    rows, dpre: inputs and dpre of the W - 1 tokens from t on; returns those of the next step. CHECKED: some rows may be
    past the end, or among the last W - 1, which take dfinal and whose windows reach tokens that are not the segment's.
    """
    loaded = _load_rows(x, t + (W - 1), left, x_token, channel, channel_ok, ROWS, CHECKED)
    given = _load_rows(dy, t + (W - 1), left, dy_token, channel, channel_ok, ROWS, CHECKED)
    dx += tl.cast(t, tl.int64) * C
    for u in tl.static_range(ROWS):
        rows = rows + (_widened(loaded[u]),)
        own = activation_gradient(_widened(given[u]), _convolved(constant, taps, rows, u, W), ACTIVATION)
        dpre = dpre + (own,)
        if CHECKED:
            own = tl.where(t + u + (W - 1) < count, own, 0.0)
        sums_of = _added(sums_of, own, rows, u, W)
        total = tl.zeros(channel.shape, tl.float32)
        for i in tl.static_range(W):
            total += taps[i] * dpre[u + (W - 1) - i]
        if CHECKED and dfinal is not None:
            kept = t + u - left + (W - 1)
            total += _load_row(dfinal, kept, W - 1, C, channel, channel_ok).to(tl.float32)
        _write(dx, u, count - t, C, channel, channel_ok, total, CHECKED)
    return rows[ROWS:], dpre[ROWS:], sums_of
