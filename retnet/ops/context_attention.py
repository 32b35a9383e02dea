"""Softmax attention of one shard of a long row to its own tokens and to those of earlier shards.

There are three forms, which agree up to rounding. `layers/attention.py` chooses:

- `ring_attention`: PyTorch's context parallelism. Keys and values travel from process to process, so that each holds
  those of two shards at a time. It is exact for rows that are one document each, without windows, ALiBi and dropout,
  in dtypes that a fused kernel of the device takes.
- Flex attention over the keys and values of all shards, gathered: packed documents, windows and ALiBi on CUDA, with
  `attention.block_mask`. PyTorch's own form of it gathers the same tensors. It also wants shards of whole blocks of 128
  tokens, and its masks reorder rows unless a global option of PyTorch is off, so it is not used.
- `gathered_attention`: the reference, for every device, dtype and option. It gathers too, and computes a document after
  the other.

Gathered keys and values take 4 T G K bytes per layer in bfloat16, for a row of T tokens: 8.6 GB for 1,048,576 tokens of
16 heads of 128.

PyTorch's context parallelism reorders rows by default, so that causal attention costs all processes the same: each gets
a piece from the head of the row and one from its tail. Retention would read such a row in the wrong order without an
error. Here it is always off, and the last process of a ring computes the most.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from retnet.ops.attention import cached_attention, causal_attention
from retnet.ops.context_shard import ContextShard, outside_graphs

aten = torch.ops.aten


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, shard: ContextShard, *, window: int | None, **options: Any
) -> Tensor:
    """Attention of q [B, T, H, K], k, v [B, T, G, K] of this shard, whose tokens have these positions [B, T].

    window, options: as for `causal_attention`. The first sequence also attends to its tokens on earlier shards.
    """
    low, first = shard.rank * shard.tokens, shard.first_tokens
    begin = low - shard.start
    if window is not None:
        begin = max(begin, low - window + 1)
    keys, values = (shard.gathered(x)[:, begin : low + first] for x in (k, v))
    seen = positions[:, first - 1 : first] + torch.arange(1 - keys.shape[1], 1, device=q.device)
    out = cached_attention(q[:, :first], keys, values, positions[:, :first], seen, window=window, **options)
    bounds = [] if shard.bounds is None else pairwise(shard.bounds[1:])
    documents = [slice(start, end) for start, end in bounds]
    others = (causal_attention(q[:, d], k[:, d], v[:, d], window=window, **options) for d in documents)
    return torch.cat([out, *others], 1)


@outside_graphs
def row_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, shard: ContextShard) -> Tensor:
    """Causal attention of rows that are one document each: in a ring if a kernel fits, otherwise gathered."""
    if ring_kernel(q) is None:
        return gathered_attention(q, k, v, positions, shard, window=None)
    return ring_attention(q, k, v, shard)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, shard: ContextShard) -> Tensor:
    """Causal attention of rows that are one document each; q [B, T, H, K], k and v [B, T, G, K] of this shard."""
    return _RingAttention.apply(*(x.transpose(1, 2) for x in (q, k, v)), shard).transpose(1, 2)


def ring_kernel(q: Tensor) -> "RingKernel | None":
    """The fused kernel for queries [B, T, H, K]; None where this device, dtype or width has none."""
    if q.shape[-1] % 8:  # PyTorch pads such heads outside the kernels
        return None
    x = q.detach().transpose(1, 2)
    chosen = SDPBackend(torch._fused_sdp_choice(x, x, x, None, 0.0, True))
    return _RING_KERNELS.get((q.device.type, chosen))


class RingKernel(NamedTuple):
    """A fused kernel and its backward. options: of both. rest: names in the backward of what the forward returns beside
    the output and its log-sum-exp; "" if it is not needed there."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    options: dict[str, Any]
    forward_options: dict[str, Any]
    rest: tuple[str, ...]


_SEEDED = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset", "")
_RING_KERNELS = {
    ("cuda", SDPBackend.FLASH_ATTENTION): RingKernel(
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        {"dropout_p": 0.0, "scale": None},
        {},
        _SEEDED,
    ),
    ("cuda", SDPBackend.CUDNN_ATTENTION): RingKernel(
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
        {"attn_bias": None, "dropout_p": 0.0, "scale": None},
        {"compute_log_sumexp": True},
        _SEEDED,
    ),
    ("cpu", SDPBackend.FLASH_ATTENTION): RingKernel(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        {"dropout_p": 0.0, "scale": None},
        {},
        (),
    ),
}


@contextmanager
def _in_order(dtype: torch.dtype) -> Iterator[Any]:
    """PyTorch's module of ring attention, for rows in their order, one neighbour's keys at a time."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    options = ring._cp_options
    before = options.enable_load_balance, options.rotate_method, options.convert_to_f32
    options.enable_load_balance, options.rotate_method = False, ring._RotateMethod.ALL_TO_ALL
    options.convert_to_f32 = dtype != torch.float64
    try:
        yield ring
    finally:
        options.enable_load_balance, options.rotate_method, options.convert_to_f32 = before


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shard: ContextShard) -> Tensor:
        kernel = ring_kernel(q.transpose(1, 2))
        assert kernel is not None
        repeats = q.shape[1] // k.shape[1]

        def one(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
            return kernel.forward(q, _repeated(k, repeats), _repeated(v, repeats), **options)

        ctx.kernel, ctx.group, ctx.repeats = kernel, shard.group or dist.group.WORLD, repeats
        with _in_order(q.dtype) as ring:
            out, log_sum, *rest = ring._templated_ring_attention(
                ctx.group, 2, one, q, k, v, is_causal=True, **kernel.options, **kernel.forward_options
            )
        named = {name: x for name, x in zip(kernel.rest, rest, strict=True) if name}
        ctx.tensors = [name for name, x in named.items() if isinstance(x, Tensor)]
        ctx.others = {name: x for name, x in named.items() if name not in ctx.tensors}
        ctx.save_for_backward(q, k, v, out, log_sum, *(named[name] for name in ctx.tensors))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, log_sum, *tensors = ctx.saved_tensors
        named = dict(zip(ctx.tensors, tensors, strict=True)) | ctx.others

        def one(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, ...]:
            key, value = _repeated(key, ctx.repeats), _repeated(value, ctx.repeats)
            dq, dk, dv, *rest = ctx.kernel.backward(query=query, key=key, value=value, **options)
            return dq, _summed(dk, ctx.repeats), _summed(dv, ctx.repeats), *rest

        with _in_order(q.dtype) as ring:
            dq, dk, dv, *_ = ring._templated_ring_attention_backward(
                ctx.group, 2, one, dout.contiguous(), "grad_out", q, k, v, out, log_sum, True,
                **ctx.kernel.options, **named,
            )  # fmt: skip
        return dq, dk, dv, None


def _repeated(x: Tensor, repeats: int) -> Tensor:
    """Keys or values [B, G, T, K] for each head of queries."""
    return x if repeats == 1 else x.repeat_interleave(repeats, 1)


def _summed(x: Tensor, repeats: int) -> Tensor:
    """The adjoint of `_repeated`."""
    return x if repeats == 1 else x.unflatten(1, (-1, repeats)).sum(2)
