"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Eq. 2 and Algorithm 2), with a state and a backward.

    h_t = exp(step_t rate) h_{t-1} + (step_t x_t) write_t^T        y_t = h_t read_t

A channel d has N states, each with a decay of its own: step [D] times rate [D, N] (the paper's Delta and A; write and
read are its B and C). Matrix products cannot do that chunk by chunk, as they can with retention's one decay per head,
so tokens are read one after another. On a GPU, `retnet/kernels/scan` does so for all segments at once. Here everything
but time is vectorised: [B, C, D, N] tensors exist for one chunk of C tokens at a time, in the backward too, which keeps
the state at the start of each chunk and recomputes the rest. float64 on a GPU runs here as well. There, launching a
kernel per token takes longer than its work, so a chunk is cut into blocks that are scanned at once and then joined:
3 sqrt(C) launches instead of C.
"""

from collections.abc import Callable
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from retnet.ops.derivatives import has_tangent, needs_plain_form, plain_gradients
from retnet.ops.device import current_device_of
from retnet.ops.direct import is_direct
from retnet.ops.dtypes import wide_dtype
from retnet.ops.ragged import equal_blocks

# (tokens per chunk, blocks scanned at once); larger chunks do not fit into a CPU's cache
_CPU, _CUDA = (32, 1), (256, 16)
_SEGMENT = 32  # tokens per segment of the kernels, which keep the state before each for the backward


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    blocks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan T tokens.

    Args:
        x, step: [B, T, D] inputs and time steps (> 0).
        rate: [D, N], < 0.
        write, read: [B, T, N].
        state: [S, D, N] before the first token (zeros if None); S = B, or the number of packed sequences.
        cu_seqlens: [S + 1] bounds of the sequences packed into one row (B = 1): 0, ..., T.
        chunk_size: tokens whose states are held at a time. blocks: parts of a chunk that are scanned at once, where
            they divide it. Neither changes the result beyond rounding; given either, a GPU does not use its kernels.

    Returns y [B, T, D] in x's dtype, and the state [S, D, N] after the last token in float32 (float64 for float64).
    """
    given = (x, step, rate, write, read, state)
    if needs_plain_form(*given):
        return _per_sequence(_plain_scan, *given, cu_seqlens)
    if x.is_cuda and wide_dtype(x.dtype) == torch.float32 and chunk_size is None and blocks is None:
        if not is_direct(*given, cu_seqlens):
            y, final, _ = torch.ops.retnet.selective_scan(*given, cu_seqlens)
        elif torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in given):
            y, final = _Scan.apply(*given, cu_seqlens)
        else:
            y, final, _ = _scan(*given, cu_seqlens)
        return y, final
    defaults = _CUDA if x.is_cuda else _CPU
    plan = (chunk_size or defaults[0], blocks or defaults[1])
    return _per_sequence(lambda *tokens: _SelectiveScan.apply(*tokens, *plan), *given, cu_seqlens)


def _float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without autocast, whose first tensor is on the device: a scan is computed in float32 or wider."""

    @wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        kind = next(x.device.type for x in args if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return alone


@_float32
def _per_sequence(
    scan: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scan rows of one length together, and packed sequences one by one, in float32 or wider."""
    wide, bounds = wide_dtype(x.dtype), None if cu_seqlens is None else cu_seqlens.tolist()
    num_sequences = x.shape[0] if bounds is None else len(bounds) - 1
    if state is None:
        state = x.new_zeros(num_sequences, x.shape[2], rate.shape[1], dtype=wide)
    tokens, rate, state = [z.to(wide) for z in (x, step, write, read)], rate.to(wide), state.to(wide)
    outs, finals = [tokens[0][:, :0]], [state[:0]]
    for rows, span, sequences in equal_blocks(x.shape[0], x.shape[1], bounds):
        u, dt, w, r = (z[rows, span] for z in tokens)
        y, final = scan(u, dt, rate, w, r, state[sequences]) if u.shape[1] else (u, state[sequences])
        outs.append(y)
        finals.append(final)
    return torch.cat(outs, 1).to(x.dtype), torch.cat(finals)


def _plain_scan(
    x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of T tokens by the definition, differentiable by autograd; all states [B, T, D, N] are held."""
    decays = (step[..., None] * rate).exp()
    writes = (step * x)[..., None] * write[:, :, None]
    states = []
    for decay, new in zip(decays.unbind(1), writes.unbind(1), strict=True):
        state = decay * state + new
        states.append(state)
    return torch.matmul(torch.stack(states, 1), read[..., None])[..., 0], state


@_float32
def selective_scan_step(
    x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x, step [B, 1, D], write, read [B, 1, N], state [B, D, N] -> (y [B, 1, D], the new state)."""
    decay = (step[:, 0, :, None].to(state.dtype) * rate.to(state.dtype)).exp()
    new = decay * state + (step * x)[:, 0, :, None].to(state.dtype) * write.to(state.dtype)
    return torch.matmul(new, read[:, 0, :, None].to(state.dtype))[:, None, :, 0].to(x.dtype), new


def _scan_(decay: Tensor, states: Tensor, blocks: int, reverse: bool = False) -> None:
    """states[t] += decay[t] states[t - 1] (t + 1 if reverse) along dimension 1, in place; decay is overwritten."""
    R = blocks if states.shape[1] % blocks == 0 else 1
    h, a = (z.unflatten(1, (R, -1)) for z in (states, decay))
    places, parts = list(range(h.shape[2])), list(range(R))
    if reverse:
        places, parts = places[::-1], parts[::-1]
    for before, t in pairwise(places):
        h[:, :, t].addcmul_(a[:, :, t], h[:, :, before])
        if R > 1:
            a[:, :, t].mul_(a[:, :, before])
    # Each block lacks what came before it: the last state of the previous block, decayed by a.
    for before, part in pairwise(parts):
        h[:, part].addcmul_(a[:, part], h[:, before, places[-1], None])


def _states(x: Tensor, step: Tensor, rate: Tensor, write: Tensor, start: Tensor, blocks: int) -> Tensor:
    """States [B, C, D, N] after each token of one chunk."""
    decay = torch.mul(step[..., None], rate).exp_()
    states = (step * x)[..., None] * write[:, :, None]
    states[:, 0].addcmul_(decay[:, 0], start)
    _scan_(decay, states, blocks)
    return states


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, rate, write, read, state, chunk_size, blocks):
        starts, outs = [state], []
        for begin in range(0, x.shape[1], chunk_size):
            c = slice(begin, begin + chunk_size)
            states = _states(x[:, c], step[:, c], rate, write[:, c], starts[-1], blocks)
            outs.append(torch.matmul(states, read[:, c, :, None])[..., 0])
            starts.append(states[:, -1].clone())
        ctx.save_for_backward(x, step, rate, write, read, *starts[:-1])
        ctx.chunk_size, ctx.blocks = chunk_size, blocks
        return torch.cat(outs, 1), starts[-1].clone()

    @staticmethod
    @_float32
    def backward(ctx, dy, dfinal):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step, rate, write, read, *starts = ctx.saved_tensors
        if torch.is_grad_enabled() or needs_plain_form(dy, dfinal):
            inputs, needed = (x, step, rate, write, read, starts[0]), ctx.needs_input_grad[:6]
            return *plain_gradients(_plain_scan, inputs, needed, (dy, dfinal)), None, None
        dx, dstep, dwrite, dread = (torch.empty_like(z) for z in (x, step, write, read))
        drate = torch.zeros_like(rate)
        carried = dfinal  # the gradient of a chunk's last state from the tokens after it
        for n in reversed(range(len(starts))):
            c = slice(n * ctx.chunk_size, (n + 1) * ctx.chunk_size)
            states = _states(x[:, c], step[:, c], rate, write[:, c], starts[n], ctx.blocks)
            decay = torch.mul(step[:, c, :, None], rate).exp_()
            dread[:, c] = torch.matmul(dy[:, c, None], states)[:, :, 0]
            dstates = dy[:, c, :, None] * read[:, c, None]
            dstates[:, -1] += carried
            _scan_(torch.cat([decay[:, 1:], decay[:, :1]], 1), dstates, ctx.blocks, reverse=True)
            carried = dstates[:, 0] * decay[:, 0]
            dwrite[:, c] = torch.matmul((step * x)[:, c, None], dstates)[:, :, 0]
            dinput = torch.matmul(dstates, write[:, c, :, None])[..., 0]
            # d log decay = dstates * decay * (the state before)
            before = torch.cat([starts[n][:, None], states[:, :-1]], 1)
            dlog = dstates.mul_(decay).mul_(before)
            dstep[:, c] = dinput * x[:, c] + (dlog * rate).sum(-1)
            dx[:, c] = dinput * step[:, c]
            drate += torch.einsum("bcdn,bcd->dn", dlog, step[:, c])
        return dx, dstep, drate, dwrite, dread, carried, None, None


def _scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the last state, the state [segments, N, D] before each segment)."""
    from retnet.kernels.scan.recorded import scan

    with current_device_of(x):
        return scan(x, step, rate, write, read, state, cu_seqlens, _SEGMENT)


def _scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from retnet.kernels.scan.recorded import scan_gradients

    with current_device_of(x):
        inputs = x, step, rate, write, read, state, cu_seqlens
        dx, dstep, drate, dwrite, dread, dstate = scan_gradients(dy, dfinal, starts, *inputs, _SEGMENT)
    return dx, dstep, drate.to(rate.dtype), dwrite, dread, dstate


_operator = partial(torch.library.custom_op, mutates_args=(), device_types="cuda")
_scan_cuda = _operator("retnet::selective_scan", _scan)
_scan_backward_cuda = _operator("retnet::selective_scan_backward", _scan_backward)


@_scan_cuda.register_fake
def _(x, step, rate, write, read, state, cu_seqlens):
    B, T, D = x.shape
    segments = -(-T // _SEGMENT)
    sequences, slots = B, B * segments
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        slots = segments + sequences
    final = x.new_empty(sequences, D, rate.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), final, final.new_empty(slots, rate.shape[1], D)


@_scan_backward_cuda.register_fake
def _(dy, dfinal, x, step, rate, write, read, state, cu_seqlens, starts):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dstate = x.new_empty(sequences, x.shape[2], rate.shape[1], dtype=torch.float32)
    return *(z.new_empty(z.shape) for z in (x, step, rate, write, read)), dstate


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[2])


def _gradients(ctx, dy, dfinal, _):
    *inputs, cu_seqlens, _ = ctx.saved_tensors
    x, state = inputs[0], inputs[5]
    if torch.is_grad_enabled() or has_tangent(dy, dfinal):
        plain = partial(_per_sequence, _plain_scan, cu_seqlens=cu_seqlens)
        return *plain_gradients(plain, inputs, ctx.needs_input_grad[:6], (dy, dfinal)), None
    dy = torch.zeros_like(x) if dy is None else dy
    run = _scan_backward if is_direct(dy, dfinal, *ctx.saved_tensors) else torch.ops.retnet.selective_scan_backward
    *grads, dstate = run(dy, dfinal, *ctx.saved_tensors)
    return *grads, None if state is None else dstate.to(state.dtype), None


_scan_cuda.register_autograd(_gradients, setup_context=_save)


class _Scan(torch.autograd.Function):
    """The operator for calls that go round the dispatcher (`is_direct`)."""

    @staticmethod
    def forward(ctx, *inputs):
        y, final, starts = _scan(*inputs)
        _save(ctx, inputs, (y, final, starts))
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, dy, dfinal, None)
