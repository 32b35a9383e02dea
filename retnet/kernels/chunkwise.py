"""Chunkwise retention on the GPU: which kernels take a call, and a plan that says so.

`portable` takes every argument. On Hopper GPUs, 16 bits with a fixed decay and one query head a value head goes to
`walk`, which keeps the state on chip (and has no gradient of log_decay and no states of packed sequences). Both are
deterministic and neither waits for the device.
"""

from dataclasses import asdict

import torch
from torch import Tensor

from retnet.kernels.portable import portable_backward, portable_forward, portable_tiles
from retnet.kernels.states import stored_dtype
from retnet.kernels.tiles import device_family, step_tile


def retention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    state_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, G, K], v [B, T, H, V] -> out [B, T, H, V] in v's dtype, final state [N, H, K, V] in `state_dtype`.

    `chunk_size` (None or 0: the tuned one) is taken to the nearest supported segment; the walk has one of its own.
    """
    if _may_walk(q, v):
        from retnet.kernels import walk

        if walk.walk_supported(q, k, v, log_decay, state, mask, cu_seqlens):
            return walk.walk_forward(q, k, v, log_decay, scale, state, mask, cu_seqlens, state_dtype)
    return portable_forward(q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size, state_dtype)


def retention_backward(
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
    chunk_size: int | None,
    need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients (dq, dk, dv, dlog_decay or None, dstate [N, H, K, V] float32) from dout and dfinal, if any."""
    if _may_walk(q, v) and not need_dlog_decay:
        from retnet.kernels import walk

        if walk.walk_supported(q, k, v, log_decay, state, mask, cu_seqlens, dfinal):
            dq, dk, dv, dstate = walk.walk_backward(dout, dfinal, q, k, v, log_decay, scale, state, mask, cu_seqlens)
            return dq, dk, dv, None, dstate
    return portable_backward(
        dout, dfinal, q, k, v, log_decay, scale, state, mask, cu_seqlens, chunk_size, need_dlog_decay
    )


def plan(q: Tensor, v: Tensor, mode: str, chunk_size: int | None) -> dict[str, object]:
    """The kernels and block shapes that q [B, T, G, K] and v [B, T, H, V] will run with in a mode."""
    if mode == "recurrent":
        BV, warps = step_tile(q.shape[-1], v.shape[-1], v.shape[0] * v.shape[2], torch.float32)
        return {"kernels": "step", "device_family": device_family(q.device), "BV": BV, "warps": warps}
    tiles = portable_tiles(q, v, q.shape[0], chunk_size)
    result: dict[str, object] = {
        "kernels": "portable",
        "device_family": device_family(q.device),
        "segment": tiles.segment,
        "stored_states": str(stored_dtype(v.dtype)).removeprefix("torch."),
        **{name: asdict(getattr(tiles, name)) for name in ("state", "key_contraction", "value_contraction")},
    }
    if _may_walk(q, v):
        from retnet.kernels import walk

        fixed = torch.empty(v.shape[2], dtype=torch.float32, device=v.device)
        if walk.walk_supported(q, q, v, fixed, None, None, None):
            result["kernels"] = "walk (fixed decay without gradient; no state with cu_seqlens), else portable"
            result["walk"] = walk.walk_plan(*v.shape[:3], q.shape[-1], v.shape[-1], v.device)
    return result


def _may_walk(q: Tensor, v: Tensor) -> bool:
    """Cheap and without the walk's imports, which other devices may lack: the walk itself decides."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] == v.shape[2]
        and q.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )
