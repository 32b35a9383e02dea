"""Forward and backward pass on Hopper GPUs, made of walks.

A walk keeps the state on chip and writes none to memory (`walk_kernel`). The adjoint of retention is retention, so the
same kernel makes the output, dV, dQ and dK, with the tensors in other roles. For small heads one walk makes both dK and
dV (`walk_dk_dv`).

Where B * H * (slices of V) programs would leave most of the chip idle, every sequence is split into parts. A walk over
all parts at once, without readers, finds what each part adds to the state. `part_starts_kernel` chains these, and then
every part is walked from its true state.

Masked tokens and packed documents change the decays of a few chunks (`token_codes`). Tensors under a mask are read from
copies that have zeros at masked tokens. The last states of packed documents may lie inside a chunk, so a further walk
of each document by itself finds them.

Two runs give the same bits: no sum depends on the order in which programs run. Nothing waits for the device. Memory
beyond outputs and gradients: the states of the parts, and copies of tensors that are masked or that TMA cannot address.

A decay per token takes running sums of log decays in place of the codes (`token_sums`), and two of the walks leave what
its gradient is made of (`decay_gradient.py`).

Not supported here and left to the portable kernels: the gradient of a fixed log_decay, initial states of packed
documents and gradients of their last ones, with a fixed decay packing and a mask together, with a decay per token the
last states of packed documents, float32, and float16 with a mask, packing, shared heads or a decay per token (their
decays leave out `state_factors`).

Where heads share queries and keys, dQ and dK are made per head and then summed: memory of H / G times theirs, one after
the other.

A chunk that holds a document boundary multiplies what lies across it by zero. NaN or infinity there reaches the
neighbouring document's tokens of that chunk, and what follows them.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from retnet.kernels.device import is_hopper, multiprocessors
from retnet.kernels.recording import launch
from retnet.kernels.retention.hopper.decay_gradient import Crossing
from retnet.kernels.retention.hopper.dk_dv import dk_dv_supported, fits_dk_dv, walk_dk_dv
from retnet.kernels.retention.hopper.float16_range import state_factors
from retnet.kernels.retention.hopper.launch import descriptor, launch_walk, tile_of, tma_readable, variant_of
from retnet.kernels.retention.hopper.part_starts import part_starts_kernel
from retnet.kernels.retention.hopper.token_codes import token_codes
from retnet.kernels.retention.hopper.token_sums import token_sums
from retnet.kernels.retention.hopper.warp_roles import CHUNK, GROUP_VALUES
from retnet.kernels.retention.problem import RetentionGradients, RetentionProblem

KEYS = (64, 128, 256)
VALUES = (64, 128, 256, 512)
LEAST_CHUNKS = 16  # per part of a split sequence: in a shorter part, finding its first state costs more than it saves


def walk_supported(
    problem: RetentionProblem, dfinal: Tensor | None = None, *, final: bool = False, dlog_decay: bool = False
) -> bool:  # fmt: skip
    """Whether walks can compute this pass: a Hopper GPU and 16 bits.

    A backward pass, with `dlog_decay` wanted or not, or a forward pass, with the last state wanted (`final`) or not."""
    q, v, state = problem.q, problem.v, problem.state
    q_shape, v_shape = q.shape, v.shape
    bfloat16, packed, per_token = v.dtype == torch.bfloat16, problem.cu_seqlens is not None, problem.per_token
    return (
        is_hopper(q.device)
        and (bfloat16 or (v.dtype == torch.float16 and problem.plain and not per_token))
        and (q_shape[2] == v_shape[2] or bfloat16)
        and q_shape[3] in KEYS
        and v_shape[3] in VALUES
        and min(q_shape[:3]) > 0
        and (per_token or not dlog_decay)
        and (state is None or state.dtype == torch.float32)
        and not (packed and (state is not None or dfinal is not None))
        and not (packed and (final if per_token else problem.mask is not None))
    )


def walk_forward(problem: RetentionProblem, state_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """out [B, T, H, V], and the final state [N, H, K, V] in `state_dtype` (None: not computed)."""
    q, k, v = (_readable(problem, x) for x in (problem.q, problem.k, problem.v))
    call = WalkCall.of(problem)
    starts = call.part_starts(k, v, problem.state, reverse=False)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    packed, wanted = problem.cu_seqlens is not None, state_dtype is not None
    ends = call.walk(q, k, v, starts, reverse=False, out=out, store_final=wanted and not packed)
    if wanted and packed:
        starts = PartStarts(None, None)
        ends = call.walk(None, k, v, starts, reverse=False, out=None, store_final=True, documents=problem.cu_seqlens)
    return out, None if ends is None else starts.unscaled(ends[:, :, -1]).to(state_dtype).contiguous()


def walk_backward(
    problem: RetentionProblem, dout: Tensor, dfinal: Tensor | None, *, need_dstate: bool, need_dlog_decay: bool = False
) -> RetentionGradients:
    """Gradients from those of the output and of the final state, if any; packed documents have no initial state here.

    Walks alternate in direction, so that each starts on what the one before has left in the cache.
    """
    q, k, v, dout = (_readable(problem, x) for x in (problem.q, problem.k, problem.v, dout.to(problem.v.dtype)))
    call = WalkCall.of(problem)
    dstarts = call.part_starts(q, dout, None if dfinal is None else dfinal.float(), reverse=True)
    alone = q.shape[2] == v.shape[2]
    if call.is_fixed and alone and not call.partition.narrow and dk_dv_supported(q, k, v, dout):
        parts, part_chunks = call.partition.parts, call.partition.part_chunks
        dk, dv, dstate = walk_dk_dv(
            q, k, v, dout, call.log_decay, problem.scale, *dstarts,
            parts=parts, part_chunks=part_chunks, need_dstate=need_dstate,
        )  # fmt: skip
        dstate = None if dstate is None else dstarts.unscaled(dstate)
        return RetentionGradients(call.dq(dout, k, v), dk, dv, None, dstate)
    crossing = Crossing.of(q, v, call.terms) if need_dlog_decay else None
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    keep_dstate = need_dstate or (need_dlog_decay and problem.state is not None)
    ends = call.walk(k, q, dout, dstarts, reverse=True, out=dv, store_final=keep_dstate)
    dq = call.dq(dout, k, v, None if crossing is None else (crossing, q))
    dk = call.walk_over_values(v, dout, q, dstarts, None if crossing is None else (crossing, k), reverse=True)
    dstate = None if ends is None else dstarts.unscaled(ends[:, :, 0]).contiguous()
    dlog_decay = None
    if crossing is not None:
        assert call.sums is not None
        initial = None if problem.state is None or dstate is None else (problem.state * dstate).sum((2, 3))
        dlog_decay = crossing.gradient(problem.log_decay, call.sums, problem.mask, initial)
    return RetentionGradients(dq, dk, dv, dlog_decay, dstate if need_dstate else None)


def _readable(problem: RetentionProblem, x: Tensor) -> Tensor:
    """x as TMA can address it, with zeros at masked tokens: their factor is 0, but x may be NaN there."""
    return tma_readable(x if problem.mask is None else x.masked_fill(~problem.mask[..., None, None], 0))


def walk_plan(B: int, T: int, H: int, K: int, V: int, device: torch.device) -> dict[str, object]:
    """The kernels, tiles and parts that a call of this size runs with."""
    partition = _partition(B, T, H, K, V, device)
    tiles = {"over_keys": tile_of(K, V, partition.narrow), "over_values": tile_of(V, K, partition.narrow)}
    together = not partition.narrow and fits_dk_dv(T, K, V)
    dk_and_dv = "one walk, without mask and documents" if together else "two walks"
    return {"kernels": "walk_kernel", "chunk": CHUNK, **asdict(partition), **tiles, "dk_and_dv": dk_and_dv}


@dataclass(frozen=True, slots=True)
class WalkCall:
    """One forward or backward pass: its problem, its token codes, and its partition."""

    problem: RetentionProblem
    log_decay: Tensor
    codes: Tensor | None
    sums: Tensor | None
    partition: "_Partition"

    @property
    def is_fixed(self) -> bool:
        """Whether every chunk has the same decays."""
        return self.codes is None and self.sums is None

    @classmethod
    def of(cls, problem: RetentionProblem) -> "WalkCall":
        q, device = problem.q, problem.q.device
        B, T, _, K = q.shape
        codes = sums = None
        if problem.per_token:
            sums = token_sums(problem.log_decay, problem.mask, problem.cu_seqlens)
        elif not problem.plain:
            codes = token_codes(B, T, problem.mask, problem.cu_seqlens, device)
        partition = _partition(B, T, problem.v.shape[2], K, problem.v.shape[3], device)
        return cls(problem, problem.log_decay.contiguous(), codes, sums, partition)

    def part_starts(self, y: Tensor, z: Tensor, state: Tensor | None, reverse: bool) -> "PartStarts":
        """The states that the parts start from, where the whole sequence starts from `state` (None: zeros)."""
        factors = None
        if z.dtype == torch.float16:
            factors = state_factors(y, z, self.problem.scale if reverse else 1.0, state)
            state = None if state is None else state * factors[:, None, None]
        if self.partition.parts == 1:
            return PartStarts(None if state is None else state.contiguous().unsqueeze(2), factors)
        states = self.walk(None, y, z, PartStarts(None, factors), reverse=reverse, out=None, store_final=True)
        (B, T, H, V), K = self.problem.v.shape, self.problem.q.shape[-1]
        launch(
            part_starts_kernel,
            (B * H, triton.cdiv(K * V, 1024)),
            states,
            states if state is None else state.contiguous(),
            self.log_decay,
            self.log_decay if self.codes is None else self.codes,
            self.log_decay if self.sums is None else self.sums,
            T,
            self.partition.part_chunks,
            self.partition.parts,
            H,
            K * V,
            HAS_INITIAL=state is not None,
            HAS_CODES=self.codes is not None,
            PER_TOKEN=self.sums is not None,
            REVERSE=reverse,
            CHUNK=CHUNK,
            BLOCK=1024,
            num_warps=4,
        )
        return PartStarts(states, factors)

    @property
    def terms(self) -> int:
        """The terms of `Crossing`: warpgroups over all tiles of the state in the walks for dQ and dK."""
        K, V = self.problem.q.shape[-1], self.problem.v.shape[-1]
        return tile_of(V, K, self.partition.narrow).splits * K // GROUP_VALUES

    def dq(
        self, dout: Tensor, k: Tensor, v: Tensor, crossing: tuple[Crossing, Tensor] | None = None
    ) -> Tensor:  # fmt: skip
        starts = self.part_starts(k, v, self.problem.state, reverse=False)
        return self.walk_over_values(dout, v, k, starts, crossing, reverse=False)

    def walk_over_values(
        self, x: Tensor, y: Tensor, z: Tensor, starts: "PartStarts", crossing: tuple[Crossing, Tensor] | None,
        reverse: bool,
    ) -> Tensor:  # fmt: skip
        """dQ = walk(dO, V, K) or dK = reverse walk(V, dO, Q), which contract over V: in two ranges where V is wide.

        `crossing`: what to fill for the gradient of log_decay, and q or k."""
        whole = tile_of(self.problem.v.shape[-1], self.problem.q.shape[-1], self.partition.narrow).splits == 1
        make = torch.empty if whole else torch.zeros  # two ranges add to what is there
        out = make(*y.shape[:3], z.shape[3], dtype=z.dtype, device=z.device)
        self.walk(x, y, z, starts, reverse=reverse, out=out, store_final=False, over_values=True, crossing=crossing)
        return out if z.shape[2] == y.shape[2] else out.unflatten(2, (z.shape[2], -1)).sum(3)

    def walk(
        self,
        x: Tensor | None,
        y: Tensor,
        z: Tensor,
        starts: "PartStarts",
        reverse: bool,
        out: Tensor | None,
        store_final: bool,
        over_values: bool = False,
        documents: Tensor | None = None,
        crossing: tuple[Crossing, Tensor] | None = None,
    ) -> Tensor | None:
        """Launch one walk over readers x, writers y and values z; return every part's last state if `store_final`.

        Without readers the last part is skipped, because no other part starts from what it leaves.
        With `documents` (cu_seqlens) every document is walked by itself, from its first token.
        """
        (B, T, H, V), K = self.problem.v.shape, self.problem.q.shape[-1]
        partition, codes = self.partition, self.codes
        narrow, parts, part_chunks = partition.narrow, partition.parts, partition.part_chunks
        if documents is not None:
            B, parts, part_chunks, codes = documents.shape[0] - 1, 1, triton.cdiv(T, CHUNK), None
        ends = torch.empty(B, H, parts, K, V, dtype=torch.float32, device=y.device) if store_final else None
        tile = tile_of(V, K, narrow) if over_values else tile_of(K, V, narrow)
        variant = variant_of(
            K,
            V,
            narrow,
            over_values,
            reverse,
            read=x is not None,
            has_codes=codes is not None,
            per_document=documents is not None,
            has_initial=starts.states is not None,
            store_final=store_final,
            per_token=self.sums is not None,
            xy_heads=H // y.shape[2],
            z_heads=H // z.shape[2],
            crossing=crossing is not None,
        )
        y_desc = descriptor(y, tile.keys)
        unused = self.log_decay
        meets = (None, None, None, None)
        if crossing is not None:
            kept, partner = crossing
            meets = (descriptor(partner, GROUP_VALUES), kept.dots[int(reverse)], kept.borders, kept.products)
        arguments = (
            y_desc if x is None else descriptor(x, tile.keys),
            y_desc,
            descriptor(z, GROUP_VALUES * tile.groups),
            descriptor(z if out is None else out, GROUP_VALUES),
            self.log_decay,
            self.problem.scale,
            unused if starts.states is None else starts.states,
            unused if ends is None else ends,
            unused if codes is None else codes,
            unused if documents is None else documents,
            unused if self.sums is None else self.sums,
            unused if starts.factors is None else starts.factors,
            *meets,
            T,
            H,
            parts,
            part_chunks,
        )
        walked = parts - 1 if x is None and documents is None else parts
        launch_walk(variant, B * H * walked * variant.programs, arguments)
        return ends


class PartStarts(NamedTuple):
    """The states [B, H, parts, K, V] that the parts of a sequence start from (None: zeros), multiplied by `factors` [H]
    (None: by 1)."""

    states: Tensor | None
    factors: Tensor | None

    def unscaled(self, states: Tensor) -> Tensor:
        """The last states [B, H, K, V] of walks that started here, divided by the factors."""
        return states if self.factors is None else states / self.factors[:, None, None]


@dataclass(frozen=True)
class _Partition:
    """How a walk is spread over the chip: whether its tiles are `narrow`, the parts of a sequence, and the chunks of a
    part (the last part may have fewer)."""

    narrow: bool
    parts: int
    part_chunks: int


@lru_cache(maxsize=4096)
def _partition(B: int, T: int, H: int, K: int, V: int, device: torch.device) -> _Partition:
    """Enough programs to fill the chip. If twice as many are enough, narrow tiles are taken: they score every pair of
    tokens twice, which costs less than finding the state between two parts."""
    chunks, processors = triton.cdiv(T, CHUNK), multiprocessors(device)
    programs = B * H * V // (GROUP_VALUES * tile_of(K, V, False).groups)
    wanted = max(1, processors // programs)
    if wanted == 2 and tile_of(K, V, False).groups == 2:
        return _Partition(True, 1, chunks)
    part_chunks = max(triton.cdiv(chunks, wanted), min(chunks, LEAST_CHUNKS))
    return _Partition(False, triton.cdiv(chunks, part_chunks), part_chunks)
