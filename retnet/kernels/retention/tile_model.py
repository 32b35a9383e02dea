"""A model of block shapes: the shared memory and the registers of a tile, and the time that follows from them.

It chooses tiles on architectures on which none was measured, and the order in which tuning measures them. The bytes of
shared memory are an upper bound: what Triton's pipeline buffers, and the largest scratch that a change of layout takes.
Registers are a fit to compiled kernels of 16-bit inputs (dev/LOG.md). A program that needs more of either than there is
does not fit. Float32 products are split in three, which the model does not know: its tiles are fixed.

Time: a step of a program's loop waits for the slowest of the matrix products, the loads through the cache, both for all
programs of a multiprocessor together, and the latency of memory, which stages and other programs hide.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from retnet.kernels.architectures import Architecture
from retnet.kernels.device import stored_dtype
from retnet.kernels.retention.tile_shapes import SegmentTile, StateTile
from retnet.kernels.retention.tile_space import segment_space, state_space

TOKENS, HEADS, SEQUENCES = 32768, 8, 8  # of the call whose time is predicted: it fills every GPU
EFFICIENCY = 0.6  # of matrix products, against the data sheet
BARRIERS = 64  # bytes, of pipelines
LATENCY, OVERHEAD = 0.8e-6, 0.2e-6  # seconds: of a load, and of the barriers and addresses of a step


@dataclass(frozen=True)
class Prediction:
    """Bytes of shared memory per program, registers per thread, programs per multiprocessor (0: it does not fit), and
    the milliseconds of one launch over TOKENS tokens of HEADS heads (infinite if it does not fit)."""

    shared: int
    registers: int
    resident: int
    milliseconds: float


@lru_cache(maxsize=4096)
def predict_state(
    architecture: Architecture, tile: StateTile, dtype: torch.dtype, K: int, V: int, segment: int
) -> Prediction:
    """The border-state pass of heads [K, V] with segments of `segment` tokens."""
    BT, BK, BV = min(tile.BT, segment), tile.BK, tile.BV
    threads, item, stored = tile.warps * architecture.lanes, dtype.itemsize, stored_dtype(dtype).itemsize
    cells = BK * BV / threads
    loads = BT * (BK + BV) * item
    scratch = 0 if architecture.lanes == 64 else max(BT * BK * item, BK * BV * stored)
    shared = _buffers(architecture, tile.stages) * loads + scratch + BARRIERS
    registers = 40 + 1.6 * cells + loads / threads * (0.75 if architecture.lanes == 64 else 0.125)
    registers += 35 if stored > item else 0  # float16, whose states are rounded and stored as float32
    registers += 40 if architecture.name.startswith("sm_10") else 0  # the state comes from tensor memory to be decayed
    programs = SEQUENCES * HEADS * math.ceil(K / BK) * math.ceil(V / BV)
    stores = BK * BV * stored * BT / segment  # per step
    unique = TOKENS * HEADS * ((K + V) * item + K * V * stored / segment)
    return _prediction(
        architecture, tile.warps, tile.stages, dtype, shared, registers, programs,
        steps=TOKENS // SEQUENCES / BT, operations=2 * BT * BK * BV, moved=loads + stores, unique=unique,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def predict_segment(
    architecture: Architecture, tile: SegmentTile, dtype: torch.dtype, R: int, O: int, segment: int
) -> Prediction:
    """The segment kernel with rows of R and columns of O."""
    BM, BO = min(tile.BM, segment), tile.BO
    BN, BR = min(tile.BN, BM), tile.BR
    threads, item, stored = tile.warps * architecture.lanes, dtype.itemsize, stored_dtype(dtype).itemsize
    whole = BR >= R
    slice_ = (BM + BN) * BR * item + BR * BO * stored
    scratch = 0 if architecture.lanes == 64 else BM * BN * 4 + BN * BO * item
    shared = max(_buffers(architecture, tile.stages) * slice_, scratch) + BARRIERS
    registers = 80 + (1.3 * BM * (BO + BN) + 0.2 * slice_) / threads
    programs = TOKENS / segment * HEADS * (segment / BM) * math.ceil(O / BO)
    pairs = (segment + BM) / 2  # tokens that a row tile meets, on average
    operations = 2 * BM * R * BO * _slowdown(dtype, stored) + 2 * BM * pairs * (R + BO)
    moved = (BM * R + pairs * (R + BO)) * item + R * BO * stored + BM * BO * item
    moved += 0 if whole else (pairs / BN - 1) * BM * R * item  # x once more per tile of pairs
    slices = math.ceil(R / BR)
    steps = (math.ceil(R / tile.BS) if whole else 0) + pairs / BN * slices + pairs / BN
    unique = TOKENS * HEADS * ((2 * R + 2 * O) * item + R * O * stored / segment)
    return _prediction(
        architecture, tile.warps, tile.stages, dtype, shared, registers, programs,
        steps=steps, operations=operations / steps, moved=moved / steps, unique=unique,
    )  # fmt: skip


def _buffers(architecture: Architecture, stages: int) -> int:
    """The tiles that a pipeline keeps in shared memory. Asynchronous products hold one more while they run."""
    return max(1, stages if architecture.asynchronous_products else stages - 1)


def _slowdown(dtype: torch.dtype, stored: int) -> float:
    """The time of a product with a stored state, against one of two inputs: float16 meets float32 states in tf32."""
    return 2.0 if dtype == torch.float16 and stored == 4 else 1.0


def _prediction(
    architecture: Architecture, warps: int, stages: int, dtype: torch.dtype, shared: float, registers: float,
    programs: float, *, steps: float, operations: float, moved: float, unique: float,
) -> Prediction:  # fmt: skip
    """operations, moved: floating-point operations and bytes of one step; unique: bytes that the call has to move."""
    resident = _resident(architecture, warps, shared, registers)
    if resident == 0:
        return Prediction(math.ceil(shared), math.ceil(registers), 0, math.inf)
    processors = architecture.processors
    rate = architecture.tflops * 1e12 * EFFICIENCY / processors / (6 if dtype == torch.float32 else 1)
    cache = architecture.cache_bandwidth * 1e12 / processors
    together = min(resident, math.ceil(programs / processors))
    alone = operations / rate + LATENCY / max(1, stages - 1) + OVERHEAD
    step = max(together * operations / rate, together * moved / cache, alone)
    waves = programs / (processors * resident)
    waves = 1.0 if waves <= 1 else (waves + math.ceil(waves)) / 2  # a last wave that is not full costs about half
    inside, outside = waves * steps * step, unique / (architecture.bandwidth * 1e12)
    seconds = max(inside, outside) + 0.2 * min(inside, outside)  # the two overlap, though not entirely
    return Prediction(math.ceil(shared), math.ceil(registers), resident, 1e3 * seconds)


def _resident(architecture: Architecture, warps: int, shared: float, registers: float) -> int:
    if shared > architecture.shared or registers > 1.15 * architecture.most_registers:
        return 0
    per_program = math.ceil(registers / 8) * 8 * warps * architecture.lanes
    return min(
        int(architecture.shared_in_all // (shared + 1024)) or 1,  # the system takes 1 KiB per program
        max(1, architecture.registers // per_program),
        architecture.warps // warps,
        architecture.programs,
    )


@lru_cache(maxsize=256)
def best_state_tiles(
    architecture: Architecture, dtype: torch.dtype, K: int, V: int, segment: int
) -> tuple[StateTile, ...]:
    """The fastest tile of every size, from large to small, without the sizes that a smaller one beats.

    ValueError if none fits, which no architecture of the table meets."""
    times = {
        tile: predict_state(architecture, tile, dtype, K, V, segment).milliseconds
        for tile in state_space(architecture, K, V, segment)
    }
    _check(times, architecture)
    kept: list[StateTile] = []
    for size in sorted({_cells(tile) for tile in times}):
        tile = min((t for t in times if _cells(t) == size), key=times.__getitem__)
        if not kept or times[tile] < times[kept[-1]]:
            kept.append(tile)
    return tuple(reversed(kept))


@lru_cache(maxsize=256)
def best_segment_tile(architecture: Architecture, dtype: torch.dtype, R: int, O: int, segment: int) -> SegmentTile:
    """The fastest tile of the segment kernel. ValueError if none fits."""
    times = {
        tile: predict_segment(architecture, tile, dtype, R, O, segment).milliseconds
        for tile in segment_space(architecture, R, O, segment)
    }
    _check(times, architecture)
    return min(times, key=times.__getitem__)


def _cells(tile: StateTile) -> int:
    return tile.BK * tile.BV


def _check(times: dict, architecture: Architecture) -> None:
    if all(map(math.isinf, times.values())):
        raise ValueError(f"no block shape fits {architecture.name} with {architecture.shared} bytes per program")
