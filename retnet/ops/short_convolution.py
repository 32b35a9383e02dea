"""Causal depthwise convolution over a few tokens, with the tokens before them as its state, and its activation.

    y_t = activation(bias + sum_i weight_i x_{t - (W - 1) + i})        i = 0 .. W - 1

Mamba, Hyena and retention use it. On a GPU, `retnet/kernels/convolution` computes it, and its backward computes the sum
again: only x is kept. Elsewhere it is W multiply-adds over shifted views: for a width of 4 on one core that is as fast
as PyTorch's depthwise convolution forward, and 1.6 to 2 times as fast with its backward in float32. There, a packed row
is spread out so that the W - 1 inputs before each document precede it, without a loop over documents.
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops.derivatives import has_tangent, needs_plain_form, plain_gradients, transforms_active
from retnet.ops.device import current_device_of
from retnet.ops.direct import is_direct
from retnet.ops.plan import is_exporting

Activation = Literal["none", "silu"]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_WIDTHS = range(2, 9)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    recent: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve T tokens.

    Args:
        x: [B, T, C]; a slice of a wider product is read in place.
        weight: [C, 1, W], in the layout of `torch.nn.Conv1d`; the last tap is the current token's.
        bias: [C].
        activation: "silu", or "none".
        recent: [N, W - 1, C] the inputs before the first token (zeros if None); N = B, or the packed documents.
        cu_seqlens: [N + 1] bounds of documents packed into one row (B = 1).

    Returns y [B, T, C] in x's dtype, and the inputs [N, W - 1, C] that a next call needs.
    """
    if _has_kernel(x, weight) and not needs_plain_form(x, weight, bias, recent):
        arguments = x, weight, bias, recent, cu_seqlens, activation
        if not is_direct(x, weight, bias, recent, cu_seqlens):
            return torch.ops.retnet.short_convolution(*arguments)
        if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, weight, bias, recent)):
            return _Convolution.apply(*arguments)
        return _convolve(*arguments)
    return _plain_convolution(x, weight, bias, recent, cu_seqlens, activation)


def _plain_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recent: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """The convolution as multiply-adds over shifted views."""
    past = weight.shape[-1] - 1
    num_sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    recent = x.new_zeros(num_sequences, past, x.shape[-1]) if recent is None else recent.to(x.dtype)
    if cu_seqlens is None:
        spread = torch.cat([recent, x], 1)
        return _taps(spread, weight, bias, activation), spread[:, spread.shape[1] - past :]
    bounds = cu_seqlens.long()
    tokens, sequences = torch.arange(x.shape[1], device=x.device), torch.arange(num_sequences, device=x.device)
    document = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    # Document n begins n * past later than in the packed row, and its past stands before it.
    starts = (bounds[:-1] + sequences * past)[:, None] + torch.arange(past, device=x.device)
    ends = starts + bounds.diff()[:, None]
    spread = x.new_zeros(x.shape[1] + num_sequences * past, x.shape[2])
    spread = spread.index_copy(0, starts.flatten(), recent.flatten(0, 1))
    spread = spread.index_copy(0, tokens + (document + 1) * past, x[0])
    y = _taps(spread[None], weight, bias, activation)[0].index_select(0, tokens + document * past)
    return y[None], spread.index_select(0, ends.flatten()).unflatten(0, (num_sequences, past))


def _taps(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """[B, T + W - 1, C] -> [B, T, C]."""
    if torch.compiler.is_compiling() or transforms_active():
        return _plain_taps(x, weight, bias, activation)
    if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, weight, bias)):
        return _Taps.apply(x, weight, bias, activation)
    pre = _multiply_add(x, weight, bias)
    y = F.silu(pre, inplace=True) if activation == "silu" else pre
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _plain_taps(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """In operators that have every derivative, which torch's silu has not."""
    pre = _multiply_add(x, weight, bias)
    if activation == "silu":
        pre = F.silu(pre) if torch.compiler.is_compiling() else pre * pre.sigmoid()
    return pre.to(x.dtype)


def _multiply_add(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_tokens = x.shape[1] - weight.shape[-1] + 1
    first, *others = weight[:, 0].unbind(-1)
    total = x[:, :num_tokens] * first if bias is None else torch.addcmul(bias, x[:, :num_tokens], first)
    for i, tap in enumerate(others, 1):
        total = torch.addcmul(total, x[:, i : i + num_tokens], tap)
    return total


class _Taps(torch.autograd.Function):
    """`_plain_taps` whose gradient is a few sums in place: autograd's has a zeroed copy of x per tap."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        pre = _multiply_add(x, weight, bias)
        silu = activation == "silu"
        ctx.save_for_backward(x, weight, bias, pre if silu else None)
        ctx.activation = activation
        return (F.silu(pre) if silu else pre).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, pre = ctx.saved_tensors
        if torch.is_grad_enabled() or needs_plain_form(dy):

            def plain(x, weight, bias):
                return [_plain_taps(x, weight, bias, ctx.activation)]

            return *plain_gradients(plain, (x, weight, bias), ctx.needs_input_grad[:3], (dy,)), None
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        dpre = dy if pre is None else torch.ops.aten.silu_backward(dy.to(pre.dtype), pre)
        num_tokens, dx, dtaps = dy.shape[1], x.new_zeros(x.shape) if need_dx else None, []
        buffer = torch.empty_like(dpre)
        for i, tap in enumerate(weight[:, 0].unbind(-1)):
            if dx is not None:
                dx[:, i : i + num_tokens].addcmul_(dpre, tap)
            if need_dweight:
                dtaps.append(torch.mul(dpre, x[:, i : i + num_tokens], out=buffer).sum((0, 1)))
        dweight = torch.stack(dtaps, 1)[:, None].to(weight.dtype) if need_dweight else None
        return dx, dweight, dpre.sum((0, 1)).to(bias.dtype) if need_dbias else None, None


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """On a GPU, and not while torch.export traces, which keeps to plain operators."""
    supported = x.dtype in KERNEL_DTYPES and weight.dtype in KERNEL_DTYPES and weight.shape[-1] in KERNEL_WIDTHS
    return x.is_cuda and supported and not is_exporting()


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, recent: Tensor | None, cu_seqlens: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    from retnet.kernels.convolution.recorded import convolve

    with current_device_of(x):
        return convolve(x, weight, bias, recent, cu_seqlens, activation)


def _convolve_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recent: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from retnet.kernels.convolution.recorded import convolve_backward

    with current_device_of(x):
        return convolve_backward(dy, dfinal, x, weight, bias, recent, cu_seqlens, activation)


_operator = partial(torch.library.custom_op, mutates_args=(), device_types="cuda")
_convolution_cuda = _operator("retnet::short_convolution", _convolve)
_convolution_backward_cuda = _operator("retnet::short_convolution_backward", _convolve_backward)


@_convolution_cuda.register_fake
def _(x, weight, bias, recent, cu_seqlens, activation):
    y = x.new_empty(x.shape)
    return y, _state_like(x, weight, cu_seqlens)


@_convolution_backward_cuda.register_fake
def _(dy, dfinal, x, weight, bias, recent, cu_seqlens, activation):
    dbias = x.new_empty(x.shape[2], dtype=torch.float32 if bias is None else bias.dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, _state_like(x, weight, cu_seqlens)


def _state_like(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(sequences, weight.shape[-1] - 1, x.shape[2])


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy, dfinal):
    x, weight, bias, recent, cu_seqlens = ctx.saved_tensors
    inputs = x, weight, bias, recent
    if torch.is_grad_enabled() or has_tangent(dy, dfinal):
        plain = partial(_plain_convolution, cu_seqlens=cu_seqlens, activation=ctx.activation)
        return *plain_gradients(plain, inputs, ctx.needs_input_grad[:4], (dy, dfinal)), None, None
    dy = x.new_zeros(x.shape) if dy is None else dy
    direct = is_direct(dy, dfinal, *ctx.saved_tensors)
    run = _convolve_backward if direct else torch.ops.retnet.short_convolution_backward
    dx, dweight, dbias, drecent = run(dy, dfinal, *inputs, cu_seqlens, ctx.activation)
    drecent = None if recent is None else drecent.to(recent.dtype)
    return dx, dweight, None if bias is None else dbias, drecent, None, None


_convolution_cuda.register_autograd(_gradients, setup_context=_save)


class _Convolution(torch.autograd.Function):
    """The operator for calls that go round the dispatcher (`is_direct`)."""

    @staticmethod
    def forward(ctx, *inputs):
        _save(ctx, inputs, None)
        return _convolve(*inputs)

    @staticmethod
    def backward(ctx, dy, dfinal):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, dy, dfinal)
