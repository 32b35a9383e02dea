"""The retention operator: one definition (Sun et al. 2023, arXiv 2307.08621, Eq. 6), three orders of summation.

    S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t        out_t = scale q_t S_t

This file checks arguments, chooses a form, and calls the operators of `ops/library.py`, which dispatch to the CPU's
streamed chunks or to the GPU kernels. No normaliser lives here: the paper's
are invariances of the head norm that follows, or a layer's option (`decay_norm`).
"""

import os
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from retnet.ops import reference
from retnet.ops.dtypes import wide_dtype
from retnet.ops.library import check_values

Mode = Literal["auto", "parallel", "recurrent", "chunkwise"]
Backend = Literal["auto", "torch", "triton", "aten"]

# Tokens a chunk on the CPU. At every head size tried, from (64, 64) to (256, 512), 64 was the fastest or within 10% of
# it (dev/LOG.md): fewer tokens cost more passes over the state, more cost work inside the chunk.
CPU_CHUNK_SIZE = 64


@dataclass(frozen=True)
class RetentionPlan:
    """What will run for a set of arguments: the form, the tokens a chunk, the code, and the kernels' own detail."""

    mode: str
    chunk_size: int
    backend: str
    detail: dict[str, Any]


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
        chunk_size: tokens a chunk; never changes the result beyond rounding.
        state_dtype: of the returned state; float32 (float64 for float64) if None.
        return_state: False returns None in the state's place.
        backend: "torch" (CPU), "triton" (CUDA), "aten" (plain operators, exportable), or "auto": by device, and aten
            inside torch.export.

    Returns:
        out [B, T, H, V] in v's dtype, and the state [N, H, K, V] after the last token.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit; the message names what was given and accepted.
    """
    q, k, v = _autocast(q, k, v)
    _check(q, k, v, log_decay, state, mask, cu_seqlens)
    if state_dtype is not None and not state_dtype.is_floating_point:
        raise TypeError(f"state_dtype is {state_dtype}; accepted: a floating-point dtype, or None")
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    plan = _resolve(q, v, mode, chunk_size, backend)
    scale = _scale(scale, q)
    wide = wide_dtype(v.dtype)
    if plan.backend == "aten":
        out, final = _aten(plan, q, k, v, log_decay, scale, state, mask, cu_seqlens)
        return out, final.to(state_dtype or wide) if return_state else None
    out, final = torch.ops.retnet.retention(
        q,
        k,
        v,
        log_decay,
        scale,
        state,
        mask,
        cu_seqlens,
        plan.mode,
        plan.chunk_size,
        state_dtype or wide,
        return_state,
    )
    return out, final if return_state else None


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
    """One or a few tokens, T, read recurrently with the state [B, H, K, V] updated in place. No gradients.

    Arguments as for `retention`; the state may be narrower than float32 and is then rounded once a call.
    Returns out [B, T, H, V] in v's dtype.
    """
    if not isinstance(state, Tensor):
        raise TypeError(f"state is {state!r}; accepted: the tensor [B, H, K, V] to update")
    _check(q, k, v, log_decay, state, mask, None)
    return torch.ops.retnet.retention_step_(q, k, v, log_decay, state, _scale(scale, q), mask)


def retention_plan(
    q: Tensor,
    v: Tensor,
    *,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    backend: Backend = "auto",
    per_token: bool = False,
) -> RetentionPlan:
    """What `retention` will run for q [B, T, G, K] and v [B, T, H, V]: a forced mode or backend is never replaced.

    On a GPU "auto" is recurrent for one token and chunkwise for more; the parallel form runs as plain operators (aten).
    per_token: whether log_decay is [B, T, H], which other kernels and block shapes serve there.
    """
    plan = _resolve(q, v, mode, chunk_size, backend)
    if plan.backend != "triton":
        return plan
    from retnet.kernels.retention.dispatch import plan as kernel_plan

    detail = kernel_plan(q, v, plan.mode, plan.chunk_size, per_token)
    return RetentionPlan(plan.mode, cast(int, detail["chunk"]), plan.backend, detail)


def _resolve(q: Tensor, v: Tensor, mode: Mode, chunk_size: int | None, backend: Backend) -> RetentionPlan:
    """The plan without the kernels' detail, which torch.compile traces. Chunks of 0 tokens: the kernels choose."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; accepted: {', '.join(get_args(Mode))}")
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; accepted: {', '.join(get_args(Backend))}")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; accepted: a positive integer or None")
    num_tokens, on_gpu = q.shape[1], q.device.type == "cuda"
    if backend == "auto" and _exporting():
        backend = "aten"
    if backend == "auto":
        has_kernel = v.dtype != torch.float64 and mode != "parallel"
        backend = ("triton" if has_kernel else "aten") if on_gpu else "torch"
    if (backend == "triton") != on_gpu and backend != "aten":
        raise ValueError(
            f"backend is {backend!r} for tensors on {q.device}; accepted there: {'triton' if on_gpu else 'torch'}, aten"
        )
    if backend == "triton":
        if mode == "parallel":
            raise ValueError("mode is 'parallel' for backend 'triton'; accepted there: auto, recurrent, chunkwise")
        if mode == "auto":
            mode = "recurrent" if num_tokens == 1 else "chunkwise"
        return RetentionPlan(mode, chunk_size or 0, backend, {})
    chunk = chunk_size or CPU_CHUNK_SIZE
    if mode == "auto":
        mode = "recurrent" if num_tokens == 1 else "parallel" if num_tokens <= chunk else "chunkwise"
    if mode != "chunkwise":
        chunk = 1 if mode == "recurrent" else max(1, num_tokens)
    return RetentionPlan(mode, chunk, backend, {})


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale is {scale!r}; accepted: a number, or None for K ** -0.5")
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _exporting() -> bool:
    """Whether torch.export traces; `torch.compiler.is_exporting()` says so of torch.compile too, up to torch 2.11."""
    return torch.compiler._is_exporting_flag


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the autocast dtype where autocast is on; decay and state always stay wide."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) for x in tensors)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Shapes, dtypes and devices. Values are checked where the kernel reads them."""
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


def _aten(
    plan: RetentionPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The reference forms in float32 or wider: plain operators that torch.export and ONNX take."""
    wide = wide_dtype(v.dtype)
    options = {"chunk_size": plan.chunk_size} if plan.mode == "chunkwise" else {}
    form = {"parallel": reference.parallel, "recurrent": reference.recurrent, "chunkwise": reference.chunkwise}[
        plan.mode
    ]
    out, final = form(
        q.to(wide),
        k.to(wide),
        v.to(wide),
        log_decay,
        scale=scale,
        state=None if state is None else state.to(wide),
        mask=mask,
        cu_seqlens=cu_seqlens,
        **options,
    )
    return out.to(v.dtype), final
