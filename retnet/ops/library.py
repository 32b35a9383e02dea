"""The torch.library operators `retnet::retention`, `retnet::retention_backward` and `retnet::retention_step_`.

Each has a CPU kernel (`ops/chunkwise.py`, `ops/recurrent.py`), a CUDA one (`retnet/kernels`, imported when the first
CUDA tensor arrives), a fake for tracing, and retention its gradient. Arguments are those of `ops/retention.py`, checked
there; values are checked here, by the CPU kernels alone. Retention and its backward are registered piece by piece, not
as a `torch.library.custom_op`: what that wraps around a call took a GPU's host longer than all the kernels' launches.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from retnet.ops import cpu_chunkwise, cpu_recurrent
from retnet.ops.device import current_device_of
from retnet.ops.dtypes import wide_dtype
from retnet.ops.ragged import Compaction

_library = torch.library.Library("retnet", "FRAGMENT")
_library.define(
    "retention(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? state, Tensor? mask, "
    "Tensor? cu_seqlens, str mode, int chunk_size, ScalarType state_dtype, bool return_state) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "retention_backward(Tensor dout, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, "
    "Tensor? state, Tensor? mask, Tensor? cu_seqlens, str mode, int chunk_size, bool need_dlog_decay, "
    "bool need_dstate) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


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


@torch.library.impl(_library, "retention", "CPU")
def _retention_cpu(
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
        out, final = cpu_recurrent.forward(q, k, v, log_decay, scale, state, bounds, state_dtype)
    else:
        out, final = cpu_chunkwise.forward(
            q, k, v, log_decay, scale, state, bounds, chunk_size, state_dtype, return_state
        )
    return out if compaction is None else compaction.scatter(out), final if return_state else final.new_empty(0)


@torch.library.impl(_library, "retention_backward", "CPU")
def _retention_backward_cpu(
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
    need_dstate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    compaction = None if mask is None else Compaction.of(mask, cu_seqlens)
    per_token = log_decay.dim() == 3
    if compaction is not None:
        bounds = compaction.bounds
        dout, q, k, v = (compaction.gather(x) for x in (dout, q, k, v))
        log_decay = compaction.gather(log_decay) if per_token else log_decay
    dq, dk, dv, dlog, dstate = cpu_chunkwise.backward(
        dout, dfinal, q, k, v, log_decay, scale, state, bounds, chunk_size, need_dlog_decay
    )
    if compaction is not None:
        dq, dk, dv = (compaction.scatter(x) for x in (dq, dk, dv))
        dlog = compaction.scatter(dlog) if dlog is not None and per_token else dlog
    nothing = log_decay.new_empty(0)
    return dq, dk, dv, nothing if dlog is None else dlog, dstate if need_dstate else nothing


@torch.library.custom_op("retnet::retention_step_", mutates_args=("state",), device_types="cpu")
def _retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    check_values(log_decay.nan_to_num(0.0), None, q.shape[1])  # NaN stays in its sequence; a step runs many
    return cpu_recurrent.step_(q, k, v, log_decay, state, scale, mask)


@torch.library.impl(_library, "retention", "CUDA")
def _retention_cuda(q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, state_dtype, return_state):
    from retnet.kernels.decode.recurrent import retention_recurrent
    from retnet.kernels.retention.dispatch import retention_forward
    from retnet.kernels.retention.problem import RetentionProblem

    packed, one_token = cu_seqlens is not None, q.shape[1] == 1  # of one token all forms are the same sums
    if mode == "recurrent" and packed and not one_token:  # no kernel: operator by operator, as on a CPU
        return _retention_cpu(
            q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, state_dtype, return_state
        )
    with current_device_of(q):
        if mode == "recurrent" and not packed:
            out, final = retention_recurrent(q, k, v, log_decay, scale, state, mask, state_dtype)
        else:
            problem = RetentionProblem(q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size)
            out, final = retention_forward(problem, state_dtype if return_state else None)
    return out, final if return_state else v.new_empty(0, dtype=state_dtype)


@torch.library.impl(_library, "retention_backward", "CUDA")
def _retention_backward_cuda(
    dout, dfinal, q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, need_dlog_decay, need_dstate
):
    from retnet.kernels.retention.dispatch import retention_backward
    from retnet.kernels.retention.problem import RetentionProblem

    problem = RetentionProblem(q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size)
    with current_device_of(q):
        grads = retention_backward(problem, dout, dfinal, need_dlog_decay=need_dlog_decay, need_dstate=need_dstate)
    nothing = log_decay.new_empty(0)
    dlog, dstate = (nothing if x is None else x for x in (grads.dlog_decay, grads.dstate))
    return grads.dq, grads.dk, grads.dv, dlog, dstate


@_retention_step.register_kernel("cuda")
def _retention_step_cuda(q, k, v, log_decay, state, scale, mask):
    from retnet.kernels.decode.recurrent import retention_step

    with current_device_of(q):
        return retention_step(q, k, v, log_decay, state, scale, mask)


@torch.library.register_fake("retnet::retention", lib=_library)
def _(q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, state_dtype, return_state):
    if not return_state:
        return v.new_empty(v.shape), v.new_empty(0, dtype=state_dtype)
    num_sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty((num_sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=state_dtype)
    return v.new_empty(v.shape), final


@torch.library.register_fake("retnet::retention_backward", lib=_library)
def _(dout, dfinal, q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, need_dlog_decay, need_dstate):
    num_sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (num_sequences, v.shape[2], q.shape[3], v.shape[3]) if need_dstate else (0,)
    dstate = v.new_empty(shape, dtype=wide_dtype(v.dtype))
    dlog = log_decay.new_empty(log_decay.shape if need_dlog_decay else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlog, dstate


@_retention_step.register_fake
def _(q, k, v, log_decay, state, scale, mask):
    return v.new_empty(v.shape)


class _Retention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, _, return_state = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, log_decay, state, mask, cu_seqlens)
        ctx.scale, ctx.mode, ctx.chunk_size, ctx.return_state = scale, mode, chunk_size, return_state
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.retnet.retention.default(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, dfinal: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, log_decay, state, mask, cu_seqlens = ctx.saved_tensors
        need_dlog_decay, need_dstate = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        dq, dk, dv, dlog, dstate = torch.ops.retnet.retention_backward.default(
            torch.zeros_like(v) if dout is None else dout,
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
            need_dlog_decay,
            need_dstate,
        )
        dlog = dlog if need_dlog_decay else None
        dstate = dstate.to(state.dtype) if need_dstate else None
        return dq, dk, dv, dlog, None, dstate, None, None, None, None, None, None


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


@torch.library.impl(_library, "retention", "Autograd")
def _retention_autograd(*inputs):
    q, k, v, log_decay, _, state, *_ = inputs
    differentiable = (q, k, v, log_decay) if state is None else (q, k, v, log_decay, state)
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in differentiable):
        raise NotImplementedError(
            "retention has no forward-mode derivative of its own; accepted: reverse mode, or backend='aten'"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        return _Retention.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.retnet.retention.default(*inputs)
