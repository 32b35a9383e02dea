"""Retention on Hopper with the state on chip: what runs, in which order, and with which tiles.

The adjoint of retention is retention, so one kernel (`walk_kernel`) makes everything: the output, and dV, dQ and dK as
walks with the tensors in other roles. No state is written to memory. Where B * H * (slices of V) programs would leave
most of the chip idle, the sequence is split into parts: a pass over all parts at once, without readers, finds what each
adds to the state, `carry_kernel` chains these, and the walks start every part from its true state.

Masked tokens and packed documents change a few chunks' decays (`walk_places`). The last states of packed documents,
which may end within a chunk, come from a walk of each document by itself.

No atomics, no host synchronization, a fixed order of every sum: two runs give the same bits. Memory beyond outputs and
gradients: the parts' states, and for V = 512 two partial sums of dQ, then of dK.

Left out, and left to the portable kernels: per-token decay, the gradient of log_decay, initial states of packed
documents and gradients of their last ones, packing and a mask together, groups of heads, other dtypes.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from retnet.kernels.walk_carry import carry_kernel
from retnet.kernels.walk_kernel import walk_kernel
from retnet.kernels.walk_places import walk_places
from retnet.kernels.walk_roles import CHUNK, ROWS

DTYPES = (torch.bfloat16, torch.float16)
KEYS = (64, 128, 256)
VALUES = (64, 128, 256, 512)
MOST_KEYS = 256  # of a program: [64 values, 256 keys] in float32 take half the registers of a warpgroup's threads
_BLOCK_LAYOUT = gl.NVMMASharedLayout(128, 16, 4)  # of a descriptor's tile; made once, for it takes longer than a launch
LEAST_PART = 16  # chunks a part of a split sequence has at least: below, its start costs more than it saves


@dataclass(frozen=True)
class WalkTile:
    """How one walk is cut: keys and warpgroups (64 values each) a program, ring slots, registers of the roles."""

    keys: int
    splits: int
    groups: int
    x_stages: int
    y_stages: int
    z_stages: int
    mix_registers: int
    score_registers: int


def walk_supported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dfinal_state: Tensor | None = None,
) -> bool:
    """Whether the walk takes these arguments: a Hopper GPU, 16 bits, fixed decay, one query head per value head.

    The caller asks apart whether the gradient of log_decay is wanted: the walk does not make it.
    """
    packed_only = mask is None and state is None and dfinal_state is None
    return (
        q.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype == k.dtype == v.dtype
        and v.dtype in DTYPES
        and (cu_seqlens is None or packed_only)
        and log_decay.dim() == 1
        and log_decay.dtype == torch.float32
        and (state is None or state.dtype == torch.float32)
        and q.shape[2] == v.shape[2]
        and q.shape[-1] in KEYS
        and v.shape[-1] in VALUES
        and min(q.shape[:3]) > 0
    )


def walk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], state [N, H, K, V] -> out [B, T, H, V], final state in `state_dtype`."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    call = _Call.of(q, v, log_decay, scale, mask, cu_seqlens)
    starts = call.part_starts(k, v, state, reverse=False)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = call.walk(q, k, v, starts, reverse=False, out=out, store_final=cu_seqlens is None)
    if cu_seqlens is not None:
        final = call.walk(None, k, v, None, reverse=False, out=None, store_final=True, documents=cu_seqlens)
    return out, final[:, :, -1].to(state_dtype).contiguous()


def walk_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dstate [N, H, K, V] float32) from those of the output and of the final state, if any.

    Packed documents have no initial state here, and zeros for its gradient.
    """
    q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout.to(v.dtype))
    call = _Call.of(q, v, log_decay, scale, mask, cu_seqlens)
    starts = call.part_starts(k, v, state, reverse=False)
    dq = call.walk_over_values(dout, v, k, starts, reverse=False)
    dstarts = call.part_starts(q, dout, None if dfinal_state is None else dfinal_state.float(), reverse=True)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dstate = call.walk(k, q, dout, dstarts, reverse=True, out=dv, store_final=cu_seqlens is None)
    dk = call.walk_over_values(v, dout, q, dstarts, reverse=True)
    if cu_seqlens is not None:
        shape = (cu_seqlens.shape[0] - 1, v.shape[2], 1, q.shape[3], v.shape[3])
        dstate = torch.zeros(shape, dtype=torch.float32, device=v.device)
    return dq, dk, dv, dstate[:, :, 0].contiguous()


def walk_plan(B: int, T: int, H: int, K: int, V: int, device: torch.device) -> dict[str, object]:
    """What a call of this size will run."""
    parts, part_chunks = _parts(B, T, H, K, V, device)
    return {
        "kernels": "walk_kernel",
        "chunk": CHUNK,
        "parts": parts,
        "part_chunks": part_chunks,
        "over_keys": _tile(K, V),
        "over_values": _tile(V, K),
    }


@dataclass(frozen=True)
class _Call:
    """The walks of one forward or backward pass over q [B, T, H, K] and v [B, T, H, V]."""

    q: Tensor
    v: Tensor
    log_decay: Tensor
    scale: float
    places: Tensor | None

    @classmethod
    def of(
        cls, q: Tensor, v: Tensor, log_decay: Tensor, scale: float, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> "_Call":
        plain = mask is None and cu_seqlens is None
        places = None if plain else walk_places(q.shape[0], q.shape[1], mask, cu_seqlens, q.device)
        return cls(q, v, log_decay.contiguous(), scale, places)

    def part_starts(self, y: Tensor, z: Tensor, state: Tensor | None, reverse: bool) -> Tensor | None:
        """States [B, H, parts, K, V] from which the parts of the sequence start; None stands for zeros."""
        parts, part_chunks = self._parts
        if parts == 1:
            return None if state is None else state.contiguous().unsqueeze(2)
        states = self.walk(None, y, z, None, reverse=reverse, out=None, store_final=True)
        (B, T, H, K), V = self.q.shape, self.v.shape[-1]
        carry_kernel[(B * H, triton.cdiv(K * V, 1024))](
            states,
            states if state is None else state.contiguous(),
            self.log_decay,
            self.log_decay if self.places is None else self.places,
            T,
            part_chunks,
            parts,
            H,
            K * V,
            HAS_INITIAL=state is not None,
            PLACED=self.places is not None,
            REVERSE=reverse,
            CHUNK=CHUNK,
            BLOCK=1024,
            num_warps=4,
        )
        return states

    def walk_over_values(self, x: Tensor, y: Tensor, z: Tensor, starts: Tensor | None, reverse: bool) -> Tensor:
        """dQ = walk(dO, V, K), dK = reverse walk(V, dO, Q): the contraction runs over V, in ranges where V is wide."""
        splits = _tile(self.v.shape[-1], self.q.shape[-1]).splits
        sums = torch.empty(splits, *z.shape, dtype=z.dtype, device=z.device)
        self.walk(x, y, z, starts, reverse=reverse, out=sums.flatten(0, 1), store_final=False, over_values=True)
        return torch.add(sums[0], sums[1]) if splits == 2 else sums[0]

    def walk(
        self,
        x: Tensor | None,
        y: Tensor,
        z: Tensor,
        starts: Tensor | None,
        reverse: bool,
        out: Tensor | None,
        store_final: bool,
        over_values: bool = False,
        documents: Tensor | None = None,
    ) -> Tensor | None:
        """Launch one walk over readers x, writers y, values z; returns every part's last state if `store_final`.

        With `documents` (cu_seqlens) every document is walked by itself, from its first token on.
        """
        (B, T, H, K), V = self.q.shape, self.v.shape[-1]
        tile = _tile(V, K) if over_values else _tile(K, V)
        values = K if over_values else V
        parts, part_chunks = self._parts
        if documents is not None:
            B, parts, part_chunks = documents.shape[0] - 1, 1, triton.cdiv(T, CHUNK)
        places = None if documents is not None else self.places
        ends = torch.empty(B, H, parts, K, V, dtype=torch.float32, device=y.device) if store_final else None
        unused = self.log_decay
        y_desc = _descriptor(y, tile.keys)
        walk_kernel[(B * H * parts * tile.splits * values // (ROWS * tile.groups),)](
            y_desc if x is None else _descriptor(x, tile.keys),
            y_desc,
            _descriptor(z, ROWS * tile.groups),
            _descriptor(z if out is None else out, ROWS),
            self.log_decay,
            self.scale,
            unused if starts is None else starts,
            unused if ends is None else ends,
            unused if places is None else places,
            unused if documents is None else documents,
            T,
            B,
            H,
            parts,
            part_chunks,
            KEYS=tile.keys,
            VALUES=values,
            SPLITS=tile.splits,
            GROUPS=tile.groups,
            KEY_STRIDE=1 if over_values else V,
            VALUE_STRIDE=V if over_values else 1,
            REVERSE=reverse,
            READ=x is not None,
            PLACED=places is not None,
            PER_DOCUMENT=documents is not None,
            HAS_INITIAL=starts is not None,
            STORE_FINAL=store_final,
            X_STAGES=tile.x_stages,
            Y_STAGES=tile.y_stages,
            Z_STAGES=tile.z_stages,
            MIX_REGISTERS=tile.mix_registers,
            SCORE_REGISTERS=tile.score_registers,
            LOAD_REGISTERS=24,
            num_warps=4,
        )
        return ends

    @property
    def _parts(self) -> tuple[int, int]:
        (B, T, H, K), V = self.q.shape, self.v.shape[-1]
        return _parts(B, T, H, K, V, self.q.device)


@cache
def _tile(keys: int, values: int) -> WalkTile:
    """The tile of a walk that contracts over `keys` and makes `values`.

    Two warpgroups share x and y tiles where that leaves enough programs. The registers of four roles at 256 keys are
    what compiles without spills and without serialized products; there is no slack.
    """
    splits = max(1, keys // MOST_KEYS)
    keys //= splits
    groups = 2 if values >= 256 or (values == 128 and keys == 64) else 1
    stages = 2 if keys == 256 else 3
    mix_registers, score_registers = {256: (216, 64), 128: (184, 96), 64: (136, 96)}[keys]
    if groups == 1:
        score_registers = 96
    return WalkTile(keys, splits, groups, stages, stages, stages, mix_registers, score_registers)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _parts(B: int, T: int, H: int, K: int, V: int, device: torch.device) -> tuple[int, int]:
    """How many parts a sequence is split into, and the chunks of each (the last may have fewer)."""
    chunks = triton.cdiv(T, CHUNK)
    programs = B * H * V // (ROWS * _tile(K, V).groups)
    wanted = max(1, _processors(device) // programs)
    part_chunks = max(triton.cdiv(chunks, wanted), min(chunks, LEAST_PART))
    return triton.cdiv(chunks, part_chunks), part_chunks


def _strides(x: Tensor) -> list[int]:
    """Strides for TMA, which reads those of axes of size 1 as well: there any aligned one will do."""
    return [stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape[:-1], x.stride())] + [x.stride(-1)]


def _rows(x: Tensor) -> Tensor:
    """x itself if TMA can address it (contiguous last axis, base and other strides of 16 bytes each), else a copy."""
    step = 16 // x.element_size()
    *outer, last = _strides(x)
    if last == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % step == 0 for stride in outer):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, width: int) -> TensorDescriptor:
    """Tiles [CHUNK tokens, width features] of one head of x [B, T, H, features]."""
    return TensorDescriptor(x, list(x.shape), _strides(x), [1, CHUNK, 1, width], _BLOCK_LAYOUT)
