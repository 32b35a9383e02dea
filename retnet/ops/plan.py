"""The plan of a retention call: form, backend and tokens per chunk."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from retnet.kernels.retention.tiles import tiles_on
from retnet.system.suggest import choices

Mode = Literal["auto", "parallel", "recurrent", "chunkwise"]
Backend = Literal["auto", "torch", "triton", "aten"]
MODES, BACKENDS = get_args(Mode), get_args(Backend)

# Tokens per chunk on the CPU. At every head size tried, from (64, 64) to (256, 512), 64 was the fastest or within 10%
# of it (dev/LOG.md): smaller chunks pass over the state more often, larger ones do more work inside the chunk.
CPU_CHUNK_SIZE = 64


@dataclass(frozen=True)
class RetentionPlan:
    """The form, tokens per chunk and backend that run for a set of arguments, and the kernels' own detail."""

    mode: str
    chunk_size: int
    backend: str
    detail: dict[str, Any]


def retention_plan(
    q: Tensor,
    v: Tensor,
    *,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    backend: Backend = "auto",
    per_token: bool = False,
) -> RetentionPlan:
    """The plan of `retention` for q [B, T, G, K] and v [B, T, H, V].

    A forced mode or backend is never replaced. On a GPU, "auto" is recurrent for one token and chunkwise for more; the
    parallel form runs as plain operators (aten). The plan's `chunk_size` is what really runs: the given one on a CPU,
    on a GPU the nearest one that its kernels have.

    per_token: whether log_decay is [B, T, H]; other GPU kernels and block shapes serve it.
    """
    plan = resolve(q.shape[1], v.dtype, q.device, mode, chunk_size, backend)
    if plan.backend != "triton":
        return plan
    from retnet.kernels.retention.dispatch import plan as kernel_plan

    detail = kernel_plan(q, v, plan.mode, plan.chunk_size, per_token)
    return RetentionPlan(plan.mode, detail["chunk"], plan.backend, detail)


def chunk_tokens(
    num_tokens: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    per_token: bool = False,
    grouped: bool = False,
) -> int:
    """Tokens per chunk that `retention` uses on a device: 1 for the recurrent form, all tokens for the parallel one.

    For "cuda" on a machine without a GPU, the answer is that of a GPU of an unknown kind.

    per_token: whether log_decay is [B, T, H]. grouped: whether heads share queries and keys (G < H).
    """
    device = torch.device(device)
    plan = resolve(num_tokens, dtype, device, mode, chunk_size, "auto")
    if plan.backend != "triton":
        return plan.chunk_size
    if plan.mode == "recurrent":
        return 1
    return kernel_chunk_tokens(device, dtype, key_dim, value_dim, per_token, grouped, chunk_size)


def supported_chunk_size(q: Tensor, v: Tensor, per_token: bool, chunk_size: int | None) -> int | None:
    """The supported chunk size nearest to the given one, for callers to whom it is a hint (a model's layer).

    None stays None. Where torch.compile traces, the answer is a constant.
    """
    if chunk_size is None or not q.is_cuda:
        return chunk_size
    dtype = autocast_dtype(q)
    return kernel_chunk_tokens(
        q.device, dtype, q.shape[-1], v.shape[-1], per_token, q.shape[2] != v.shape[2], chunk_size
    )


@torch.compiler.assume_constant_result
def kernel_chunk_tokens(*arguments) -> int:
    """`_kernel_chunk_tokens`, cached. torch.compile takes the result as a constant and traces neither function."""
    return _kernel_chunk_tokens(*arguments)


@lru_cache(maxsize=4096)
def _kernel_chunk_tokens(
    device: torch.device,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    per_token: bool,
    grouped: bool,
    chunk_size: int | None,
) -> int:
    """Tokens per chunk of the GPU kernels: what `dispatch.plan` says of the smallest call of this kind."""
    if not torch.cuda.is_available():
        return tiles_on(torch.device("cpu"), dtype, key_dim, value_dim, 1, per_token, chunk_size).segment
    from retnet.kernels.retention.dispatch import plan

    q = torch.empty(1, 1, 1, key_dim, dtype=dtype, device=device)
    v = torch.empty(1, 1, 2 if grouped else 1, value_dim, dtype=dtype, device=device)
    return plan(q, v, "chunkwise", chunk_size, per_token)["chunk"]


def resolve(
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    mode: Mode,
    chunk_size: int | None,
    backend: Backend,
) -> RetentionPlan:
    """The plan without the kernels' detail, as torch.compile traces it. Chunks of 0 tokens: the kernels choose."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; {choices(mode, MODES)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; {choices(backend, BACKENDS)}")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; accepted: a positive integer or None")
    on_gpu = device.type == "cuda"
    if backend == "auto" and is_exporting():
        backend = "aten"
    if backend == "auto":
        has_kernel = dtype != torch.float64 and mode != "parallel"
        backend = ("triton" if has_kernel else "aten") if on_gpu else "torch"
    if (backend == "triton") != on_gpu and backend != "aten":
        raise ValueError(
            f"backend is {backend!r} for tensors on {device}; accepted there: {'triton' if on_gpu else 'torch'}, aten"
        )
    if backend == "triton":
        if mode == "parallel":
            raise ValueError("mode is 'parallel' for backend 'triton'; accepted there: auto, recurrent, chunkwise")
        if mode == "auto":
            mode = "recurrent" if num_tokens == 1 else "chunkwise"
        return RetentionPlan(mode, 0 if mode == "recurrent" else chunk_size or 0, backend, {})
    chunk = chunk_size or CPU_CHUNK_SIZE
    if mode == "auto":
        mode = "recurrent" if num_tokens == 1 else "parallel" if num_tokens <= chunk else "chunkwise"
    if mode != "chunkwise":
        chunk = 1 if mode == "recurrent" else max(1, num_tokens)
    return RetentionPlan(mode, chunk, backend, {})


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives x, or its own."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def is_exporting() -> bool:
    """Whether torch.export traces; `torch.compiler.is_exporting()` says so of torch.compile too, up to torch 2.11."""
    return torch.compiler._is_exporting_flag
