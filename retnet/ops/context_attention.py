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
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend

from retnet.ops.attention import cached_attention, causal_attention
from retnet.ops.context_shard import ContextShard, shard_of
from retnet.ops.dtypes import wide_dtype

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


def row_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, shard: ContextShard) -> Tensor:
    """Causal attention of rows that are one document each: in a ring if a kernel fits, otherwise gathered."""
    if not has_ring_kernel(q.device, q.dtype, *q.shape[1:]):
        return gathered_attention(q, k, v, positions, shard, window=None)
    return ring_attention(q, k, v, shard)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, shard: ContextShard) -> Tensor:
    """Causal attention of rows that are one document each; q [B, T, H, K], k and v [B, T, G, K] of this shard."""
    return torch.ops.retnet.ring_attention(q, k, v, shard.handle)[0]


@torch.compiler.assume_constant_result
def has_ring_kernel(device: torch.device, dtype: torch.dtype, T: int, H: int, K: int) -> bool:
    """Whether a fused kernel takes T queries of H heads of width K."""
    return ring_kernel(device, dtype, T, H, K) is not None


@lru_cache(maxsize=256)
def ring_kernel(device: torch.device, dtype: torch.dtype, T: int, H: int, K: int) -> "RingKernel | None":
    """The fused kernel that PyTorch takes for them; None where this device, dtype or width has none."""
    if K % 8:  # PyTorch pads such heads outside the kernels
        return None
    x = torch.empty(1, H, 1, K, dtype=dtype, device=device).expand(1, H, T, K)
    return _RING_KERNELS.get((device.type, SDPBackend(torch._fused_sdp_choice(x, x, x, None, 0.0, True))))


class RingKernel(NamedTuple):
    """A fused kernel and its backward. options: of both; the others of one. last_axis: its log-sum-exp is [B, H, T, 1].

    seeds: the backward takes those of dropout, which there is none of.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    options: dict[str, Any]
    forward_options: dict[str, Any]
    last_axis: bool
    seeds: torch.dtype | None


_OPTIONS = {"dropout_p": 0.0, "scale": None}
_RING_KERNELS = {
    ("cuda", SDPBackend.FLASH_ATTENTION): RingKernel(
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        _OPTIONS,
        {},
        False,
        torch.uint64,
    ),
    ("cuda", SDPBackend.CUDNN_ATTENTION): RingKernel(
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
        _OPTIONS | {"attn_bias": None},
        {"compute_log_sumexp": True},
        True,
        torch.int64,
    ),
    ("cpu", SDPBackend.FLASH_ATTENTION): RingKernel(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        _OPTIONS,
        {},
        False,
        None,
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


@torch.library.custom_op("retnet::ring_attention", mutates_args=())
def _ring_attention(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, K] and its log-sum-exp [B, H, T]."""
    kernel, repeats = _kernel_of(q), q.shape[2] // k.shape[2]

    def one(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
        return kernel.forward(q, _repeated(k, repeats), _repeated(v, repeats), **options)

    options = kernel.options | kernel.forward_options
    with _in_order(q.dtype) as ring:
        out, log_sum, *_ = ring._templated_ring_attention(
            _group(handle), 2, one, *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, **options
        )
    return out.transpose(1, 2).contiguous(), log_sum.reshape(out.shape[:3]).to(wide_dtype(q.dtype)).contiguous()


@torch.library.custom_op("retnet::ring_attention_backward", mutates_args=())
def _ring_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, handle: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, repeats, T = _kernel_of(q), q.shape[2] // k.shape[2], q.shape[1]

    def one(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, ...]:
        key, value = _repeated(key, repeats), _repeated(value, repeats)
        dq, dk, dv, *rest = kernel.backward(query=query, key=key, value=value, **options)
        return dq, _summed(dk, repeats), _summed(dv, repeats), *rest

    options = dict(kernel.options)
    if kernel.seeds is not None:
        seeds = torch.zeros(2, dtype=kernel.seeds, device=q.device)
        options |= {"cum_seq_q": None, "cum_seq_k": None, "max_q": T, "max_k": T}
        options |= {"philox_seed": seeds[0] if kernel.last_axis else seeds, "philox_offset": seeds[1]}
    heads = [x.transpose(1, 2) for x in (q, k, v, out)]
    with _in_order(q.dtype) as ring:
        grads = ring._templated_ring_attention_backward(
            _group(handle), 2, one, dout.transpose(1, 2), "grad_out", *heads,
            log_sum[..., None] if kernel.last_axis else log_sum, True, **options,
        )  # fmt: skip
    # dk and dv come in one buffer.
    dq, dk, dv = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in grads[:3])
    return dq, dk, dv


@_ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=wide_dtype(q.dtype))


@_ring_attention_backward.register_fake
def _(dout, q, k, v, out, log_sum, handle):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, handle = inputs
    ctx.save_for_backward(q, k, v, *output, handle)


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.retnet.ring_attention_backward(dout.contiguous(), *ctx.saved_tensors), None


_ring_attention.register_autograd(_gradients, setup_context=_save)


def _kernel_of(q: Tensor) -> RingKernel:
    kernel = ring_kernel(q.device, q.dtype, *q.shape[1:])
    assert kernel is not None
    return kernel


def _group(handle: Tensor) -> Any:
    return shard_of(handle).group or dist.group.WORLD


def _repeated(x: Tensor, repeats: int) -> Tensor:
    """Keys or values [B, G, T, K] for each head of queries."""
    return x if repeats == 1 else x.repeat_interleave(repeats, 1)


def _summed(x: Tensor, repeats: int) -> Tensor:
    """The adjoint of `_repeated`."""
    return x if repeats == 1 else x.unflatten(1, (-1, repeats)).sum(2)
