"""The torch.library operators `retnet::retention`, `retnet::retention_backward` and `retnet::retention_step_`.

Each has a CPU kernel (`ops/chunkwise.py`, `ops/recurrent.py`), a CUDA one (`retnet/kernels`, imported when the first
CUDA tensor arrives), a fake for tracing, and retention its gradient. Arguments are those of `ops/retention.py`, checked
there; values are checked here, by the CPU kernels alone.
"""

from itertools import pairwise

import torch
from torch import Tensor

from retnet.ops import chunkwise, recurrent
from retnet.ops.ragged import Compaction


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and states are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def check_values(log_decay: Tensor, cu_seqlens: Tensor | None, num_tokens: int) -> list[int] | None:
    """The bounds in cu_seqlens as a list. Reads the tensors, so on a GPU it waits for them."""
    if log_decay.numel() and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay reaches {log_decay.max().item()}; accepted: the log of a decay, <= 0 and no NaN")
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens is {bounds}; accepted: rising from 0 to T = {num_tokens}")
    return bounds


@torch.library.custom_op("retnet::retention", mutates_args=(), device_types="cpu")
def _retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    chunk_size: int,
    state_dtype: torch.dtype,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    bounds = check_values(log_decay, cu_seqlens, q.shape[1])
    compaction = None if mask is None else Compaction.of(mask, cu_seqlens)
    if compaction is not None:
        bounds = compaction.bounds
        q, k, v = (compaction.gather(x) for x in (q, k, v))
        log_decay = log_decay if log_decay.dim() == 1 else compaction.gather(log_decay)
    if mode == "recurrent":
        out, final = recurrent.forward(q, k, v, log_decay, scale, state, bounds, state_dtype)
    else:
        out, final = chunkwise.forward(q, k, v, log_decay, scale, state, bounds, chunk_size, state_dtype, return_state)
    return out if compaction is None else compaction.scatter(out), final if return_state else final.new_empty(0)


@torch.library.custom_op("retnet::retention_backward", mutates_args=(), device_types="cpu")
def _retention_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    chunk_size: int,
    need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    compaction = None if mask is None else Compaction.of(mask, cu_seqlens)
    per_token = log_decay.dim() == 3
    if compaction is not None:
        bounds = compaction.bounds
        dout, q, k, v = (compaction.gather(x) for x in (dout, q, k, v))
        log_decay = compaction.gather(log_decay) if per_token else log_decay
    dq, dk, dv, dlog, dstate = chunkwise.backward(
        dout, dfinal, q, k, v, log_decay, scale, state, bounds, chunk_size, need_dlog_decay
    )
    if compaction is not None:
        dq, dk, dv = (compaction.scatter(x) for x in (dq, dk, dv))
        dlog = compaction.scatter(dlog) if dlog is not None and per_token else dlog
    return dq, dk, dv, log_decay.new_empty(0) if dlog is None else dlog, dstate


@torch.library.custom_op("retnet::retention_step_", mutates_args=("state",), device_types="cpu")
def _retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    check_values(log_decay, None, q.shape[1])
    return recurrent.step_(q, k, v, log_decay, state, scale, mask)


@_retention.register_kernel("cuda")
def _retention_cuda(q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, state_dtype, return_state):
    if mode == "recurrent" and cu_seqlens is None:
        from retnet.kernels.step import retention_recurrent

        return retention_recurrent(q, k, v, log_decay, scale, state, mask, state_dtype)
    from retnet.kernels.chunkwise import retention_forward

    out, final = retention_forward(q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size, state_dtype)
    return out, final if return_state else final.new_empty(0)


@_retention_backward.register_kernel("cuda")
def _retention_backward_cuda(
    dout, dfinal, q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, need_dlog_decay
):
    from retnet.kernels.chunkwise import retention_backward

    dq, dk, dv, dlog, dstate = retention_backward(
        dout, dfinal, q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size, need_dlog_decay
    )
    return dq, dk, dv, log_decay.new_empty(0) if dlog is None else dlog, dstate


@_retention_step.register_kernel("cuda")
def _retention_step_cuda(q, k, v, log_decay, state, scale, mask):
    from retnet.kernels.step import retention_step

    return retention_step(q, k, v, log_decay, state, scale, mask)


@_retention.register_fake
def _(q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, state_dtype, return_state):
    if not return_state:
        return v.new_empty(v.shape), v.new_empty(0, dtype=state_dtype)
    num_sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty((num_sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=state_dtype)
    return v.new_empty(v.shape), final


@_retention_backward.register_fake
def _(dout, dfinal, q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, need_dlog_decay):
    num_sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dstate = v.new_empty((num_sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=wide_dtype(v.dtype))
    dlog = log_decay.new_empty(log_decay.shape if need_dlog_decay else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlog, dstate


@_retention_step.register_fake
def _(q, k, v, log_decay, state, scale, mask):
    return v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, _, return_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_decay, state, mask, cu_seqlens)
    ctx.scale, ctx.mode, ctx.chunk_size, ctx.return_state = scale, mode, chunk_size, return_state


def _autograd_backward(ctx, dout: Tensor | None, dfinal: Tensor | None):
    q, k, v, log_decay, state, mask, cu_seqlens = ctx.saved_tensors
    dout = torch.zeros_like(v) if dout is None else dout
    dq, dk, dv, dlog, dstate = torch.ops.retnet.retention_backward(
        dout,
        dfinal if ctx.return_state else None,
        q,
        k,
        v,
        log_decay,
        ctx.scale,
        state,
        mask,
        cu_seqlens,
        ctx.mode,
        ctx.chunk_size,
        ctx.needs_input_grad[3],
    )
    dlog = dlog if ctx.needs_input_grad[3] else None
    dstate = dstate.to(state.dtype) if ctx.needs_input_grad[5] else None
    return dq, dk, dv, dlog, None, dstate, None, None, None, None, None, None


_retention.register_autograd(_autograd_backward, setup_context=_setup_context)
