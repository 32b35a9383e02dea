"""Retention on Hopper with the state on chip: what runs, in which order, and with which tiles.

The adjoint of retention is retention, so two kernels make both passes. `walk_kernel` walks the sequence with a slice of
the state in registers: forward for the output, from the end for dV. `segment_kernel` makes dQ and dK, which sum over V,
from states that the walks save every `SEGMENT` tokens in the inputs' dtype. Where B * H * (slices of V) programs would
leave most of the chip idle, the sequence is split: a pass over all parts at once finds each part's own state,
`carry_kernel` chains them, and the walks start every part from its true state.

No atomics, no host synchronization, a fixed order of every sum: two runs give the same bits. Beyond outputs and
gradients the forward pass allocates only the final state (and the parts' states), the backward pass two states in 16
bits for every `SEGMENT` tokens.

Left out, and left to the portable kernels: masks, packed sequences, per-token decay, groups of heads, other dtypes.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as WalkDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from retnet.kernels.walk_carry import carry_kernel
from retnet.kernels.walk_decay import decay_gradient
from retnet.kernels.walk_kernel import CHUNK, PIECE, ROWS, walk_kernel
from retnet.kernels.walk_segment import segment_kernel

SEGMENT = 256  # tokens between saved states: longer moves fewer bytes and multiplies more
DTYPES = (torch.bfloat16,)
LEAST_PART = 16  # chunks a part of a split sequence has at least


@dataclass(frozen=True)
class WalkTile:
    """Tiles of the walk: warpgroups that hold state (64 values each), ring depths, registers of each role."""

    groups: int
    x_stages: int
    y_stages: int
    z_stages: int
    p_stages: int
    mix_registers: int
    score_registers: int


@dataclass(frozen=True)
class SegmentTile:
    """Tiles of the segment kernel."""

    rows: int
    block_v: int
    warps: int
    stages: int


WALK_TILES = {
    (256, 512): WalkTile(2, 2, 3, 2, 2, 216, 64),
    (128, 256): WalkTile(2, 2, 2, 2, 2, 184, 96),
    (128, 128): WalkTile(1, 3, 3, 3, 2, 184, 96),
    (64, 128): WalkTile(2, 3, 3, 3, 2, 136, 96),
}
SEGMENT_TILES = {
    (256, 512): SegmentTile(128, 32, 8, 4),
    (128, 256): SegmentTile(128, 64, 8, 3),
    (128, 128): SegmentTile(128, 64, 8, 2),
    (64, 128): SegmentTile(128, 64, 8, 2),
}


def walk_supported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> bool:
    """Whether the walk takes these arguments: a Hopper GPU, bfloat16, fixed decay, one query head per value head."""
    return (
        q.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype == k.dtype == v.dtype
        and v.dtype in DTYPES
        and mask is None
        and cu_seqlens is None
        and log_decay.dim() == 1
        and (state is None or state.dtype == torch.float32)
        and q.shape[2] == v.shape[2]
        and (q.shape[-1], v.shape[-1]) in WALK_TILES
        and min(q.shape[:3]) > 0
    )


def walk_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor | None, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], state [B, H, K, V] -> out [B, T, H, V], final state in `state_dtype`."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    starts = _part_states(k, v, log_decay, 1.0, state, reverse=False)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = _walk(q, k, v, log_decay, scale, starts, reverse=False, out=out, store_final=True)
    return out, final[:, :, -1].to(state_dtype)


def walk_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients (dq, dk, dv, dlog_decay [H] or None, dstate [B, H, K, V] float32) from dout and the final state's."""
    q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout.to(v.dtype))
    if dfinal_state is not None:
        dfinal_state = dfinal_state.float()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))

    starts = _part_states(k, v, log_decay, 1.0, state, reverse=False)
    states = _saved_like(q, v)
    final = _walk(
        None, k, v, log_decay, 1.0, starts, reverse=False, saved=states, store_final=need_dlog_decay
    )
    _segments(dout, v, k, states, log_decay, scale, dq, reverse=False)

    starts = _part_states(q, dout, log_decay, scale, dfinal_state, reverse=True)
    dstates = _saved_like(q, v)
    dstate = _walk(
        k, q, dout, log_decay, scale, starts, reverse=True, out=dv, saved=dstates, store_final=True
    )
    _segments(v, dout, q, dstates, log_decay, scale, dk, reverse=True)

    dlog_decay = None
    if need_dlog_decay:
        dlog_decay = decay_gradient(q, dq, k, dk, states, dstates, final[:, :, -1], dfinal_state, SEGMENT)
    return dq, dk, dv, dlog_decay, dstate[:, :, 0]


def walk_plan(B: int, T: int, H: int, K: int, V: int, device: torch.device) -> dict[str, object]:
    """What a call of this size will run."""
    tile = WALK_TILES[K, V]
    parts, chunks = _parts(B, T, H, V, tile, device)
    return {"kernels": "walk", "chunk": CHUNK, "parts": parts, "part_chunks": chunks, "tile": tile}


def _parts(B: int, T: int, H: int, V: int, tile: WalkTile, device: torch.device) -> tuple[int, int]:
    """How many parts a sequence is split into, and the chunks of each (the last may have fewer)."""
    chunks = triton.cdiv(T, CHUNK)
    programs = B * H * V // (ROWS * tile.groups)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, processors // programs)
    part = max(triton.cdiv(chunks, wanted), min(chunks, LEAST_PART))
    part = triton.cdiv(part * CHUNK, SEGMENT) * SEGMENT // CHUNK
    return triton.cdiv(chunks, part), part


def _part_states(
    y: Tensor, z: Tensor, log_decay: Tensor, scale: float, state: Tensor | None, reverse: bool
) -> Tensor | None:
    """States [B, H, parts, K, V] from which each part of the sequence starts; None stands for zeros."""
    (B, T, H, K), V = y.shape, z.shape[-1]
    parts, part = _parts(B, T, H, V, WALK_TILES[K, V], y.device)
    if parts == 1:
        return None if state is None else state.contiguous().unsqueeze(2)
    own = _walk(None, y, z, log_decay, scale, None, reverse=reverse, store_final=True)
    carry_kernel[(B * H, triton.cdiv(K * V, 1024))](
        own, state.contiguous() if state is not None else own, log_decay, T, part * CHUNK, parts, H, K * V,
        HAS_INITIAL=state is not None, REVERSE=reverse, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return own


def _walk(
    x: Tensor | None,
    y: Tensor,
    z: Tensor,
    log_decay: Tensor,
    scale: float,
    starts: Tensor | None,
    reverse: bool,
    out: Tensor | None = None,
    saved: Tensor | None = None,
    store_final: bool = False,
) -> Tensor | None:
    """Launch the walk over readers x, writers y, values z; returns every part's last state if `store_final`."""
    (B, T, H, K), V = y.shape, z.shape[-1]
    tile = WALK_TILES[K, V]
    parts, part = _parts(B, T, H, V, tile, y.device)
    ends = torch.empty(B, H, parts, K, V, dtype=torch.float32, device=y.device) if store_final else None
    placeholder = ends if ends is not None else starts if starts is not None else log_decay
    width = ROWS * tile.groups
    y_desc = _descriptor(y, CHUNK, K)
    z_desc = _descriptor(z, CHUNK, width)
    walk_kernel[(B * H * parts * V // width,)](
        y_desc if x is None else _descriptor(x, CHUNK, K),
        y_desc,
        z_desc,
        _descriptor(z if out is None else out, CHUNK, ROWS),
        _state_descriptor(y[0] if saved is None else saved),
        log_decay,
        scale,
        placeholder if starts is None else starts,
        placeholder if ends is None else ends,
        T,
        H,
        parts,
        part,
        K=K,
        V=V,
        GROUPS=tile.groups,
        REVERSE=reverse,
        READ=x is not None,
        SAVE_EVERY=0 if saved is None else SEGMENT // CHUNK,
        HAS_INITIAL=starts is not None,
        STORE_FINAL=store_final,
        X_STAGES=tile.x_stages,
        Y_STAGES=tile.y_stages,
        Z_STAGES=tile.z_stages,
        P_STAGES=tile.p_stages,
        MIX_REGISTERS=tile.mix_registers,
        SCORE_REGISTERS=tile.score_registers,
        LOAD_REGISTERS=24,
        num_warps=4,
    )
    return ends


def _segments(
    x: Tensor, y: Tensor, w: Tensor, saved: Tensor, log_decay: Tensor, scale: float, out: Tensor, reverse: bool
) -> None:
    """Launch the segment kernel: out = dQ from (dO, V, K, states), or dK from (V, dO, Q, dstates) in reverse."""
    (B, T, H, V), K = x.shape, w.shape[-1]
    tile = SEGMENT_TILES[K, V]
    segment_kernel[(B * H * triton.cdiv(T, tile.rows),)](
        TensorDescriptor(x, x.shape, x.stride(), [1, tile.rows, 1, tile.block_v]),
        TensorDescriptor(y, y.shape, y.stride(), [1, tile.rows, 1, tile.block_v]),
        TensorDescriptor(w, w.shape, w.stride(), [1, tile.rows, 1, K]),
        TensorDescriptor(saved, saved.shape, saved.stride(), [1, tile.block_v, K]),
        TensorDescriptor(out, out.shape, out.stride(), [1, tile.rows, 1, K]),
        log_decay,
        scale,
        T,
        H,
        K=K,
        V=V,
        SEGMENT=SEGMENT,
        ROWS=tile.rows,
        BLOCK_V=tile.block_v,
        REVERSE=reverse,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _saved_like(q: Tensor, v: Tensor) -> Tensor:
    """Room for a transposed state [V, K] at every segment's border: [B * H * segments, V, K]."""
    B, T, H, K = q.shape
    return torch.empty(B * H * triton.cdiv(T, SEGMENT), v.shape[-1], K, dtype=v.dtype, device=v.device)


def _rows(x: Tensor) -> Tensor:
    """x itself if TMA can address it (contiguous last axis, 16-byte strides and base), else a contiguous copy."""
    per_16_bytes = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(stride % per_16_bytes == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def _descriptor(x: Tensor, tokens: int, width: int) -> WalkDescriptor:
    return WalkDescriptor(x, list(x.shape), list(x.stride()), [1, tokens, 1, width], gl.NVMMASharedLayout(128, 16, 4))


def _state_descriptor(x: Tensor) -> WalkDescriptor:
    return WalkDescriptor(x, list(x.shape), list(x.stride()), [1, ROWS, PIECE], gl.NVMMASharedLayout(128, 16, 3))
