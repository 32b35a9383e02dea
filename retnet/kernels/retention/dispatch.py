"""Chunkwise retention on the GPU: the choice of kernels for a call, and a plan that reports it.

The portable kernels take every argument. On Hopper GPUs, 16-bit inputs with a fixed decay and one query head per value
head go to the Hopper kernels, which keep the state on chip. Those have no gradient of a fixed log_decay and no states
of packed sequences. Both are deterministic, and neither waits for the device.
"""

import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from retnet.kernels.architectures import architecture
from retnet.kernels.device import is_hopper, stored_dtype
from retnet.kernels.layout import layout
from retnet.kernels.recording import Recordings
from retnet.kernels.retention import tiles
from retnet.kernels.retention.portable.passes import portable_backward, portable_forward, portable_tiles
from retnet.kernels.retention.problem import RetentionGradients, RetentionProblem
from retnet.kernels.retention.tiles import SEGMENT_LENGTHS, nearest_segment, shared_tile, step_tile

forward_passes, backward_passes = Recordings(), Recordings()

# Whether the Hopper kernels also take a decay per token, with its gradient, and heads that share queries and keys. They
# are correct in an emulation of Hopper, and wait for a measurement on the device.
extended_walks = False


def retention_forward(problem: RetentionProblem, state_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """out [B, T, H, V] in v's dtype, and the final state [N, H, K, V] in `state_dtype` (None: not computed)."""
    kind = (problem.kind, problem.chunk_size, state_dtype, tiles.readings, extended_walks)
    out, final = forward_passes.run(kind, problem.tensors, lambda: _forward(problem, state_dtype))
    return out, final


def _forward(problem: RetentionProblem, state_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    if _may_walk(problem.q, problem.v, problem.per_token):
        from retnet.kernels.retention.hopper import passes as hopper

        if hopper.walk_supported(problem, final=state_dtype is not None):
            if problem.chunk_size:
                _report_chunk_size(problem.chunk_size, hopper.CHUNK, "the kernels for Hopper GPUs have only this size")
            return hopper.walk_forward(problem, state_dtype)
    if problem.chunk_size:
        lengths = ", ".join(map(str, SEGMENT_LENGTHS))
        _report_chunk_size(problem.chunk_size, nearest_segment(problem.chunk_size), f"the kernels have sizes {lengths}")
    return portable_forward(problem, state_dtype)


_reported: set[int] = set()


def _report_chunk_size(given: int, used: int, why: str) -> None:
    """Warn where another chunk size runs than the one that was given, once per process and value."""
    if used == given or given in _reported:
        return
    _reported.add(given)
    warnings.warn(f"retention uses chunks of {used} tokens instead of chunk_size={given}: {why}", stacklevel=2)


def retention_backward(
    problem: RetentionProblem, dout: Tensor, dfinal: Tensor | None, *, need_dlog_decay: bool, need_dstate: bool
) -> RetentionGradients:
    """The gradients, from those of the output and of the final state, if any."""
    kind = (
        problem.kind,
        problem.chunk_size,
        layout(dout),
        layout(dfinal),
        need_dlog_decay,
        need_dstate,
        tiles.readings,
        extended_walks,
    )
    gradients = backward_passes.run(
        kind,
        (*problem.tensors, dout, dfinal),
        lambda: _backward(problem, dout, dfinal, need_dlog_decay, need_dstate).tensors,
    )
    return RetentionGradients(*gradients)


def _backward(
    problem: RetentionProblem, dout: Tensor, dfinal: Tensor | None, need_dlog_decay: bool, need_dstate: bool
) -> RetentionGradients:
    wanted = {"need_dlog_decay": need_dlog_decay, "need_dstate": need_dstate}
    if _may_walk(problem.q, problem.v, problem.per_token):
        from retnet.kernels.retention.hopper import passes as hopper

        if hopper.walk_supported(problem, dfinal, dlog_decay=need_dlog_decay):
            return hopper.walk_backward(problem, dout, dfinal, **wanted)
    return portable_backward(problem, dout, dfinal, **wanted)


NOT_WALKED = (
    "a gradient of log_decay, mask and cu_seqlens together (float16: either), a state that is not float32, "
    "with cu_seqlens any state or gradient of the last one"
)
NOT_WALKED_PER_TOKEN = "float16, a state that is not float32, with cu_seqlens any state, the returned one included"


def plan(q: Tensor, v: Tensor, mode: str, chunk_size: int | None, per_token: bool) -> dict[str, Any]:
    """The kernels and block shapes of a mode for q [B, T, G, K] and v [B, T, H, V]. `chunk`: tokens per chunk."""
    hardware = architecture(q.device)
    name = "unknown" if hardware is None else hardware.name
    if mode == "recurrent":
        tile = step_tile(q.shape[-1], v.shape[-1], v.shape[0] * v.shape[2], torch.float32, q.shape[1])
        packed = "plain operators, one token after another"
        return {"kernels": "step", "chunk": 1, "architecture": name, **asdict(tile), "cu_seqlens": packed}
    shape = v.shape[:3] if per_token else v.shape[2:3]
    log_decay = torch.empty(shape, dtype=torch.float32, device=v.device)
    problem = RetentionProblem(q, q, v, log_decay, 1.0, chunk_size=chunk_size)
    shapes = portable_tiles(problem)
    shared = shared_tile(hardware, stored_dtype(v.dtype), q.shape[-1], v.shape[-1], shapes.segment)
    result: dict[str, Any] = {
        "kernels": "portable",
        "chunk": shapes.segment,
        "architecture": name,
        "segment": shapes.segment,
        "stored_states": str(stored_dtype(v.dtype)).removeprefix("torch."),
        **{name: asdict(getattr(shapes, name)) for name in ("state", "key_contraction", "value_contraction")},
    }
    if q.shape[2] < v.shape[2] and shared is not None:
        result["heads_that_share"] = asdict(shared)  # in place of the contractions
    if _may_walk(q, v, per_token):
        from retnet.kernels.retention.hopper import passes as hopper

        if hopper.walk_supported(problem):
            walked = hopper.walk_plan(*v.shape[:3], q.shape[-1], v.shape[-1], v.device)
            left = NOT_WALKED_PER_TOKEN if per_token else NOT_WALKED
            result |= {"kernels": "walk", "chunk": hopper.CHUNK, "walk": walked, "portable_for": left}
    return result


def _may_walk(q: Tensor, v: Tensor, per_token: bool) -> bool:
    """Whether to ask the Hopper kernels: a cheap test without their imports, which other devices may lack."""
    if (per_token or q.shape[2] != v.shape[2]) and not extended_walks:
        return False
    return q.dtype in (torch.bfloat16, torch.float16) and is_hopper(q.device)
