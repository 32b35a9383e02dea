"""The torch.library operators `retnet::retention`, `retnet::retention_backward` and `retnet::retention_step_`.

Each has a CPU kernel (`cpu_chunkwise.py`, `cpu_recurrent.py`), a CUDA kernel (`retnet/kernels`, imported when the first
CUDA tensor arrives) and a fake for tracing; retention has a gradient. `ops/retention.py` checks the arguments; the CPU
kernels check values. Below the flat signatures, which torch.library needs, a call is one `RetentionProblem`. Retention
and its backward are registered piece by piece, not as a `torch.library.custom_op`: its wrapper took more of the host's
time per call than all kernel launches together.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops import cpu_chunkwise, cpu_recurrent, reference
from retnet.ops.derivatives import has_tangent, needs_plain_form, plain_gradients
from retnet.ops.device import current_device_of
from retnet.ops.direct import is_direct
from retnet.ops.dtypes import wide_dtype
from retnet.ops.plan import CPU_CHUNK_SIZE
from retnet.ops.ragged import Compaction

# The fields of RetentionProblem, in order.
_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? state, Tensor? mask, Tensor? cu_seqlens, "
    "int chunk_size"
)
_FIELDS = _PROBLEM.count(",") + 1
_OPTIONS = 4  # arguments of `_Retention` before the tensors
_library = torch.library.Library("retnet", "FRAGMENT")
_library.define(
    f"retention({_PROBLEM}, str mode, ScalarType state_dtype, bool return_state) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"retention_backward(Tensor dout, Tensor? dfinal, {_PROBLEM}, bool need_dlog_decay, bool need_dstate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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


def _compacted(problem: RetentionProblem, compaction: Compaction) -> RetentionProblem:
    """The problem of the real tokens alone, packed into one row."""
    q, k, v = (compaction.gather(x) for x in (problem.q, problem.k, problem.v))
    log_decay = compaction.gather(problem.log_decay) if problem.per_token else problem.log_decay
    return replace(problem, q=q, k=k, v=v, log_decay=log_decay, mask=None, cu_seqlens=compaction.cu_seqlens)


@torch.library.impl(_library, "retention", "CPU")
def _retention_cpu(*arguments) -> tuple[Tensor, Tensor]:
    problem = RetentionProblem(*arguments[:_FIELDS])
    mode, state_dtype, return_state = arguments[_FIELDS:]
    bounds = check_values(problem.log_decay, problem.cu_seqlens, problem.q.shape[1])
    compaction = None
    if problem.mask is not None:
        compaction = Compaction.of(problem.mask, problem.cu_seqlens)
        problem, bounds = _compacted(problem, compaction), compaction.bounds
    if mode == "recurrent":
        out, final = cpu_recurrent.forward(problem, bounds, state_dtype)
    else:
        out, final = cpu_chunkwise.forward(problem, bounds, state_dtype, return_state)
    return out if compaction is None else compaction.scatter(out), final if return_state else final.new_empty(0)


@torch.library.impl(_library, "retention_backward", "CPU")
def _retention_backward_cpu(
    dout: Tensor, dfinal: Tensor | None, *arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = RetentionProblem(*arguments[:_FIELDS])
    need_dlog_decay, need_dstate = arguments[_FIELDS:]
    bounds = None if problem.cu_seqlens is None else problem.cu_seqlens.tolist()
    compaction = None
    if problem.mask is not None:
        compaction = Compaction.of(problem.mask, problem.cu_seqlens)
        problem, bounds = _compacted(problem, compaction), compaction.bounds
        dout = compaction.gather(dout)
    dq, dk, dv, dlog, dstate = cpu_chunkwise.backward(problem, dout, dfinal, bounds, need_dlog_decay)
    if compaction is not None:
        dq, dk, dv = (compaction.scatter(x) for x in (dq, dk, dv))
        dlog = compaction.scatter(dlog) if dlog is not None and problem.per_token else dlog
    nothing = problem.log_decay.new_empty(0)
    return dq, dk, dv, nothing if dlog is None else dlog, dstate if need_dstate else nothing


@torch.library.custom_op("retnet::retention_step_", mutates_args=("state",), device_types="cpu")
def _retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    check_values(log_decay.nan_to_num(0.0), None, q.shape[1])  # NaN stays in its sequence; a step runs many
    return cpu_recurrent.step_(RetentionProblem(q, k, v, log_decay, scale, state, mask), state)


@torch.library.impl(_library, "retention", "CUDA")
def _retention_cuda(*arguments):
    return _forward_cuda(RetentionProblem(*arguments[:_FIELDS]), *arguments[_FIELDS:])


def _forward_cuda(
    problem: RetentionProblem, mode: str, state_dtype: torch.dtype, return_state: bool
) -> tuple[Tensor, Tensor]:
    packed, one_token = problem.cu_seqlens is not None, problem.q.shape[1] == 1  # for one token, all forms are the same
    if mode == "recurrent" and packed and not one_token:  # no kernel: operator by operator, as on a CPU
        return _retention_cpu(*problem.arguments, mode, state_dtype, return_state)
    kernels = _kernels()
    with current_device_of(problem.q):
        if mode == "recurrent" and not packed:
            out, final = kernels.retention_recurrent(problem, state_dtype)
        else:
            out, final = kernels.retention_forward(problem, state_dtype if return_state else None)
    return out, final if return_state else problem.v.new_empty(0, dtype=state_dtype)


@torch.library.impl(_library, "retention_backward", "CUDA")
def _retention_backward_cuda(
    dout: Tensor, dfinal: Tensor | None, *arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_cuda(dout, dfinal, RetentionProblem(*arguments[:_FIELDS]), *arguments[_FIELDS:])


def _backward_cuda(
    dout: Tensor, dfinal: Tensor | None, problem: RetentionProblem, need_dlog_decay: bool, need_dstate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with current_device_of(problem.q):
        grads = _kernels().retention_backward(
            problem, dout, dfinal, need_dlog_decay=need_dlog_decay, need_dstate=need_dstate
        )
    nothing = problem.log_decay.new_empty(0)
    dlog, dstate = (nothing if x is None else x for x in (grads.dlog_decay, grads.dstate))
    return grads.dq, grads.dk, grads.dv, dlog, dstate


@cache
def _kernels() -> SimpleNamespace:
    """The kernels' functions, imported with the first CUDA tensor: they need Triton."""
    from retnet.kernels.decode.recurrent import retention_recurrent
    from retnet.kernels.retention.dispatch import retention_backward, retention_forward

    return SimpleNamespace(
        retention_recurrent=retention_recurrent,
        retention_forward=retention_forward,
        retention_backward=retention_backward,
    )


@_retention_step.register_kernel("cuda")
def _retention_step_cuda(q, k, v, log_decay, state, scale, mask):
    from retnet.kernels.decode.recurrent import retention_step

    with current_device_of(q):
        return retention_step(RetentionProblem(q, k, v, log_decay, scale, state, mask), state)


@torch.library.register_fake("retnet::retention", lib=_library)
def _(*arguments):
    problem = RetentionProblem(*arguments[:_FIELDS])
    _, state_dtype, return_state = arguments[_FIELDS:]
    v = problem.v
    return v.new_empty(v.shape), v.new_empty(problem.state_shape if return_state else 0, dtype=state_dtype)


@torch.library.register_fake("retnet::retention_backward", lib=_library)
def _(dout, dfinal, *arguments):
    problem = RetentionProblem(*arguments[:_FIELDS])
    need_dlog_decay, need_dstate = arguments[_FIELDS:]
    q, k, v, log_decay = problem.q, problem.k, problem.v, problem.log_decay
    dstate = v.new_empty(problem.state_shape if need_dstate else 0, dtype=wide_dtype(v.dtype))
    dlog = log_decay.new_empty(log_decay.shape if need_dlog_decay else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlog, dstate


@_retention_step.register_fake
def _(q, k, v, log_decay, state, scale, mask):
    return v.new_empty(v.shape)


class _Retention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: RetentionProblem, mode: str, state_dtype: torch.dtype, return_state: bool, *tensors):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.scale, ctx.chunk_size, ctx.options = problem.scale, problem.chunk_size, (mode, state_dtype, return_state)
        if problem.direct:
            return _forward_cuda(problem, *ctx.options)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.retnet.retention.default(*problem.arguments, *ctx.options)

    @staticmethod
    def backward(ctx, dout: Tensor | None, dfinal: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, log_decay, state, mask, cu_seqlens = ctx.saved_tensors
        problem = RetentionProblem(q, k, v, log_decay, ctx.scale, state, mask, cu_seqlens, ctx.chunk_size)
        needed = ctx.needs_input_grad[_OPTIONS:]
        dfinal = dfinal if ctx.options[-1] else None
        if torch.is_grad_enabled() or has_tangent(dout, dfinal):
            grads = _plain_backward(problem, ctx.options, needed[:5], dout, dfinal)
        else:
            dout = torch.zeros_like(problem.v) if dout is None else dout
            if is_direct(*problem.tensors, dout, dfinal):
                grads = _backward_cuda(dout, dfinal, problem, needed[3], needed[4])
            else:
                run = torch.ops.retnet.retention_backward.default
                grads = run(dout, dfinal, *problem.arguments, needed[3], needed[4])
            dstate = grads[4].to(state.dtype) if needed[4] else None
            grads = (*grads[:3], grads[3] if needed[3] else None, dstate)
        return *(None,) * _OPTIONS, *grads, None, None


def call(problem: RetentionProblem, mode: str, state_dtype: torch.dtype, return_state: bool) -> tuple[Tensor, Tensor]:
    """The operator `retnet::retention`. An eager call on a GPU (`problem.direct`) goes round the dispatcher."""
    if not problem.direct:
        return torch.ops.retnet.retention(*problem.arguments, mode, state_dtype, return_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in problem.tensors):
        return _Retention.apply(problem, mode, state_dtype, return_state, *problem.tensors)
    return _forward_cuda(problem, mode, state_dtype, return_state)


def _plain_backward(
    problem: RetentionProblem, options: tuple, needed: Sequence[bool], dout: Tensor | None, dfinal: Tensor | None
) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay and state that can be differentiated again."""

    def plain(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return _plain(replace(problem, q=q, k=k, v=v, log_decay=log_decay, state=state), *options)

    inputs = problem.q, problem.k, problem.v, problem.log_decay, problem.state
    return plain_gradients(plain, inputs, needed, (dout, dfinal))


def _plain(problem: RetentionProblem, mode: str, state_dtype: torch.dtype, return_state: bool) -> tuple[Tensor, Tensor]:
    """The operator in plain operators. Kernels that choose their own chunks have none to give: 0."""
    out, final = reference.in_wide_dtype(mode, replace(problem, chunk_size=problem.chunk_size or CPU_CHUNK_SIZE))
    return out, final.to(state_dtype) if return_state else final.new_empty(0, dtype=state_dtype)


@torch.library.impl(_library, "retention", "Autograd")
def _retention_autograd(*arguments):
    problem, options = RetentionProblem(*arguments[:_FIELDS]), arguments[_FIELDS:]
    differentiable = problem.tensors[:5]
    if needs_plain_form(*differentiable):
        return _plain(problem, *options)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        return _Retention.apply(problem, *options, *problem.tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.retnet.retention.default(*arguments)
