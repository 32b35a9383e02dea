"""Causal depthwise convolution over a few tokens, with the tokens before them as its state: part of Mamba and Hyena.

    y_t = bias + sum_i weight_i x_{t - (W - 1) + i}        i = 0 .. W - 1

On a GPU, `retnet/kernels/convolution` computes it. Elsewhere it is W multiply-adds over shifted views: for a width of 4
on a CPU that is as fast as PyTorch's depthwise convolution forward, and two to three times as fast with its backward in
float32 and bfloat16. There, a packed row is spread out so that the W - 1 inputs before each document precede it,
without a loop over documents.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from retnet.ops.derivatives import has_tangent, needs_plain_form, plain_gradients
from retnet.ops.device import current_device_of
from retnet.ops.plan import is_exporting

Activation = Literal["none", "silu"]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_WIDTHS = range(2, 9)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recent: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve T tokens.

    Args:
        x: [B, T, C].
        weight: [C, 1, W], in the layout of `torch.nn.Conv1d`; the last tap is the current token's.
        bias: [C].
        recent: [N, W - 1, C] the inputs before the first token (zeros if None); N = B, or the packed documents.
        cu_seqlens: [N + 1] bounds of documents packed into one row (B = 1).

    Returns y [B, T, C] and the inputs [N, W - 1, C] that a next call needs.
    """
    if _has_kernel(x, weight) and not needs_plain_form(x, weight, bias, recent):
        return torch.ops.retnet.short_convolution(x, weight, bias, recent, cu_seqlens)
    return _plain_convolution(x, weight, bias, recent, cu_seqlens)


def _plain_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, recent: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The convolution as multiply-adds over shifted views."""
    past = weight.shape[-1] - 1
    num_sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if recent is None:
        recent = x.new_zeros(num_sequences, past, x.shape[-1])
    if cu_seqlens is None:
        spread = torch.cat([recent.to(x.dtype), x], 1)
        return _taps(spread, weight, bias), spread[:, spread.shape[1] - past :]
    bounds = cu_seqlens.long()
    tokens, sequences = torch.arange(x.shape[1], device=x.device), torch.arange(num_sequences, device=x.device)
    document = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    # Document n begins n * past later than in the packed row, and its past stands before it.
    starts = (bounds[:-1] + sequences * past)[:, None] + torch.arange(past, device=x.device)
    ends = starts + bounds.diff()[:, None]
    spread = x.new_zeros(x.shape[1] + num_sequences * past, x.shape[2])
    spread = spread.index_copy(0, starts.flatten(), recent.flatten(0, 1).to(x.dtype))
    spread = spread.index_copy(0, tokens + (document + 1) * past, x[0])
    y = _taps(spread[None], weight, bias)[0].index_select(0, tokens + document * past)
    return y[None], spread.index_select(0, ends.flatten()).unflatten(0, (num_sequences, past))


def _taps(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, T + W - 1, C] -> [B, T, C]."""
    num_tokens = x.shape[1] - weight.shape[-1] + 1
    first, *others = weight[:, 0].unbind(-1)
    y = x[:, :num_tokens] * first if bias is None else torch.addcmul(bias, x[:, :num_tokens], first)
    for i, tap in enumerate(others, 1):
        y = torch.addcmul(y, x[:, i : i + num_tokens], tap)
    return y


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """On a GPU, and not while torch.export traces, which keeps to plain operators."""
    supported = x.dtype in KERNEL_DTYPES and weight.dtype in KERNEL_DTYPES and weight.shape[-1] in KERNEL_WIDTHS
    return x.is_cuda and supported and not is_exporting()


@torch.library.custom_op("retnet::short_convolution", mutates_args=(), device_types="cuda")
def _convolution_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, recent: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    from retnet.kernels.convolution.short import Convolution, convolution_forward

    with current_device_of(x):
        return convolution_forward(Convolution.of(x, weight, recent, cu_seqlens), bias)


@torch.library.custom_op("retnet::short_convolution_backward", mutates_args=(), device_types="cuda")
def _convolution_backward_cuda(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, recent: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from retnet.kernels.convolution.short import Convolution, convolution_backward

    with current_device_of(x):
        call = Convolution.of(x, weight, recent, cu_seqlens)
        dx, dweight, dbias, drecent = convolution_backward(call, dy, dfinal)
    return dx, dweight[:, None].to(weight.dtype), dbias, drecent


@_convolution_cuda.register_fake
def _(x, weight, bias, recent, cu_seqlens):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(sequences, weight.shape[-1] - 1, x.shape[2])


@_convolution_backward_cuda.register_fake
def _(dy, dfinal, x, weight, recent, cu_seqlens):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dweight, dbias = weight.new_empty(weight.shape), x.new_empty(x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), dweight, dbias, x.new_empty(sequences, weight.shape[-1] - 1, x.shape[2])


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, bias, recent, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, recent, cu_seqlens)


def _gradients(ctx, dy, dfinal):
    *inputs, cu_seqlens = ctx.saved_tensors
    x, weight, bias, recent = inputs
    if torch.is_grad_enabled() or has_tangent(dy, dfinal):
        plain = partial(_plain_convolution, cu_seqlens=cu_seqlens)
        return *plain_gradients(plain, inputs, ctx.needs_input_grad[:4], (dy, dfinal)), None
    dy = x.new_zeros(x.shape) if dy is None else dy
    dx, dweight, dbias, drecent = torch.ops.retnet.short_convolution_backward(dy, dfinal, x, weight, recent, cu_seqlens)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight, dbias, None if recent is None else drecent.to(recent.dtype), None


_convolution_cuda.register_autograd(_gradients, setup_context=_save)
