"""The retention operator: one definition (Sun et al. 2023, arXiv 2307.08621, Eq. 6), three orders of summation.

    S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t        out_t = scale q_t S_t

This file checks arguments, resolves the plan, and calls the operators of `ops/library.py`, which dispatch to the CPU
forms or the GPU kernels. No normaliser lives here: the paper's are invariances of the head norm that follows, or a
layer's option (`decay_norm`).
"""

import os
from typing import NoReturn

import torch
from torch import Tensor

from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops import reference
from retnet.ops.derivatives import needs_plain_form
from retnet.ops.direct import is_direct
from retnet.ops.dtypes import wide_dtype
from retnet.ops.library import call, check_values
from retnet.ops.plan import Backend, Mode, RetentionPlan, autocast_dtype, resolve
from retnet.ops.plan import chunk_tokens as chunk_tokens
from retnet.ops.plan import retention_plan as retention_plan


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    state_dtype: torch.dtype | None = None,
    return_state: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Retention of T tokens in any of its forms, which agree up to rounding in outputs, states and gradients.

    Args:
        q, k: [B, T, G, K] queries and keys, already rotated. G divides H; head h reads group h // (H // G).
        v: [B, T, H, V] values.
        log_decay: [H] (fixed) or [B, T, H] (per token), natural log, <= 0, float32 (float64 for float64 inputs).
            -inf is a hard reset.
        scale: multiplies q; K ** -0.5 if None.
        state: [N, H, K, V] before the first token (zeros if None); N is B, or the number of packed sequences.
        mask: [B, T] bool; a False token neither decays nor writes, and its output is 0.
        cu_seqlens: [N + 1] int32 or int64 bounds of the sequences packed into one row (B = 1): 0, ..., T.
        mode: "parallel" (Eq. 5), "recurrent" (Eq. 6), "chunkwise" (Eq. 7), or "auto": recurrent for one token, parallel
            while T fits into one chunk, else chunkwise.
        chunk_size: tokens per chunk of the chunkwise form; never changes the result beyond rounding. A CPU uses
            exactly this many. A GPU uses the nearest number that its kernels have: a call whose chunk_size it does not
            use warns, once per process and value, and `retention_plan` says what runs.
        state_dtype: of the returned state; float32 (float64 for float64) if None.
        return_state: False returns None instead of the state.
        backend: "torch" (CPU), "triton" (CUDA), "aten" (plain operators, exportable), or "auto": by device, and aten
            inside torch.export.

    Returns:
        out [B, T, H, V] in v's dtype, and the state [N, H, K, V] after the last token.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit; the message names what was given and accepted.
    """
    problem, plan = checked_call(q, k, v, log_decay, scale, state, mask, cu_seqlens, mode, chunk_size, backend)
    if state_dtype is not None and not state_dtype.is_floating_point:
        raise TypeError(f"state_dtype is {state_dtype}; accepted: a floating-point dtype, or None")
    state_dtype = state_dtype or wide_dtype(problem.v.dtype)
    if plan.backend == "aten":
        out, final = reference.in_wide_dtype(plan.mode, problem)
        return out, final.to(state_dtype) if return_state else None
    out, final = call(problem, plan.mode, state_dtype, return_state)
    return out, final if return_state else None


def checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[RetentionProblem, RetentionPlan]:
    """The inputs of a call of `retention` as the operators take them, and the form and backend that run."""
    q, k, v = _autocast(q, k, v)
    problem = RetentionProblem(q, k, v, log_decay, 1.0, state, mask, cu_seqlens, chunk_size)
    key = _key(problem, scale, mode, backend)
    plan = _known.get(key) if key is not None else None
    if plan is None:
        problem = RetentionProblem(q, k, v, log_decay, 1.0, state, mask, cu_seqlens)
        _check(problem)
        problem.scale = _scale(scale, q)
        if cu_seqlens is not None:
            problem.cu_seqlens = cu_seqlens.contiguous()
        plan = resolve(q.shape[1], v.dtype, q.device, mode, chunk_size, backend)
        if key is not None:
            if len(_known) >= MOST_KNOWN:
                _known.clear()
            _known[key] = plan
    problem.chunk_size = plan.chunk_size
    return problem, plan


MOST_KNOWN = 4096
_known: dict[tuple, RetentionPlan] = {}  # the plans of checked calls, by all that the checks look at


def _key(problem: RetentionProblem, scale: float | None, mode: Mode, backend: Backend) -> tuple | None:
    """What an eager call on a GPU (`is_direct`) is known by; None for other calls, which are checked every time."""
    problem.direct = is_direct(*problem.tensors)
    plain = type(mode) is str and type(backend) is str and type(problem.chunk_size) in (int, type(None))
    if not problem.direct or not plain or problem.q.dim() != 4 or os.environ.get("RETNET_DEBUG") == "1":
        return None
    if type(scale) not in (float, type(None)) or not (problem.cu_seqlens is None or problem.cu_seqlens.is_contiguous()):
        return None
    problem.scale = _scale(scale, problem.q)
    return problem.kind, problem.chunk_size, mode, backend


def retention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One or a few tokens, T, read recurrently with the state [B, H, K, V] updated in place.

    Arguments as for `retention`; a state narrower than float32 is rounded once per call.
    Returns out [B, T, H, V] in v's dtype. Raises NotImplementedError for derivatives of any kind.
    """
    if not isinstance(state, Tensor):
        raise TypeError(f"state is {state!r}; accepted: the tensor [B, H, K, V] to update")
    _check(RetentionProblem(q, k, v, log_decay, 1.0, state, mask))
    if needs_plain_form(q, k, v, log_decay, state):
        _refuse_derivatives()
    out = torch.ops.retnet.retention_step_(q, k, v, log_decay, state, _scale(scale, q), mask)
    if out.requires_grad and not torch.compiler.is_compiling():
        out.register_hook(_refuse_derivatives)
    return out


def _refuse_derivatives(_: Tensor | None = None) -> NoReturn:
    raise NotImplementedError(
        "retention_step_ overwrites its state and has no derivatives, nor transforms of torch.func; accepted: retention"
    )


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale is {scale!r}; accepted: a number, or None for K ** -0.5")
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the autocast dtype where autocast is on; decay and state stay float32 or wider."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = autocast_dtype(tensors[0])
    return tuple(x.to(dtype) for x in tensors)


def _check(problem: RetentionProblem) -> None:
    """Shapes, dtypes and devices. Values are checked where the kernel reads them."""
    q, k, v, log_decay = problem.q, problem.k, problem.v, problem.log_decay
    state, mask, cu_seqlens = problem.state, problem.mask, problem.cu_seqlens
    for name, x, sizes in (("q", q, "[B, T, G, K]"), ("k", k, "[B, T, G, K]"), ("v", v, "[B, T, H, V]")):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; accepted: {sizes}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} and q is {q.dtype}; accepted: q, k and v of one floating-point dtype")
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    if k.shape != q.shape or v.shape[:2] != (B, T) or 0 in (G, H, K, V) or H % G:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; accepted: q and k [B, T, G, K], "
            "v [B, T, H, V] with the same B and T, G dividing H, and no empty head"
        )
    wide = wide_dtype(q.dtype)
    if log_decay.shape not in ((H,), (B, T, H)) or log_decay.dtype != wide:
        raise ValueError(
            f"log_decay is {log_decay.dtype} of shape {list(log_decay.shape)}; accepted for these inputs: {wide} of "
            f"shape [{H}] or [{B}, {T}, {H}]"
        )
    N = B
    if cu_seqlens is not None:
        if (
            cu_seqlens.dim() != 1
            or cu_seqlens.shape[0] < 1
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
            or B != 1
        ):
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)} with B = {B}; accepted: int32 or "
                "int64 [N + 1] with B = 1"
            )
        N = cu_seqlens.shape[0] - 1
    if state is not None and (state.shape != (N, H, K, V) or not state.is_floating_point()):
        raise ValueError(
            f"state is {state.dtype} of shape {list(state.shape)}; accepted: floating point [{N}, {H}, {K}, {V}]"
        )
    if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} of shape {list(mask.shape)}; accepted: bool [{B}, {T}]")
    for name, x in (
        ("k", k),
        ("v", v),
        ("log_decay", log_decay),
        ("state", state),
        ("mask", mask),
        ("cu_seqlens", cu_seqlens),
    ):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}; accepted: one device")
    if q.device.type == "cuda" and os.environ.get("RETNET_DEBUG") == "1":
        check_values(log_decay, cu_seqlens, T)
