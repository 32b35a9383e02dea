"""The block shapes among which tuning searches and the model of an architecture chooses."""

import itertools
from collections.abc import Iterator
from dataclasses import fields

from retnet.kernels.architectures import KIB, Architecture
from retnet.kernels.device import power_of_two
from retnet.kernels.retention.tile_shapes import SegmentTile, StateTile


def state_space(architecture: Architecture, K: int, V: int, segment: int) -> Iterator[StateTile]:
    """Tiles of the border-state pass for heads of [K, V]; a step of a tile is at most a segment."""
    key, value = power_of_two(K), power_of_two(V)
    steps = [min(BT, segment) for BT in (32, 64, 128)]
    keys = [BK for BK in (16, 32, 64, 128) if min(key, 32) <= BK <= key]
    values = [BV for BV in (16, 32, 64, 128, 256) if min(value, 32) <= BV <= value]
    tiles = (
        StateTile(BT, BK, BV, 8 if BK * BV > 128 * 128 else 4, stages)
        for BT, BK, BV, stages in itertools.product(steps, keys, values, _stages(architecture))
    )
    yield from dict.fromkeys(tiles)


def segment_space(architecture: Architecture, R: int, O: int, segment: int) -> Iterator[SegmentTile]:
    """Tiles of the segment kernel for rows of R and columns of O. Longer steps than 64 have never been faster."""
    row, width = power_of_two(R), power_of_two(O)
    steps = {min(row, 64)} if _is_roomy(architecture) else {min(row, 32), min(row, 64)}
    stages = (2,) if architecture.lanes == 64 else (2, 3)
    shapes = [shape for shape in _SHAPES if shape[0] <= segment]
    tiles = (
        SegmentTile(BM, BN, step, step, min(BO, width), warps, depth)
        for (BM, BN, BO, warps), depth, step in itertools.product(shapes, stages, sorted(steps))
    )
    yield from dict.fromkeys(tiles)


_SHAPES = (
    (64, 32, 64, 4), (64, 64, 64, 4), (64, 64, 128, 4), (128, 64, 64, 4), (128, 64, 128, 8), (128, 64, 256, 8),
)  # fmt: skip


def _is_roomy(architecture: Architecture) -> bool:
    return architecture.shared >= 160 * KIB


def _stages(architecture: Architecture) -> tuple[int, ...]:
    """Pipeline depths. AMD's compiler keeps one tile ahead in registers, whatever a deeper pipeline asks for."""
    if architecture.lanes == 64:
        return (2,)
    return (3, 4) if _is_roomy(architecture) else (2, 3)


def are_neighbours(a: StateTile | SegmentTile, b: StateTile | SegmentTile) -> bool:
    """Whether two tiles of one kind differ in at most two numbers, each by a factor of two, or by one stage."""
    differing = [(x, y) for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a)) if x != y]
    return 1 <= len(differing) <= 2 and all(max(x, y) <= 2 * min(x, y) for x, y in differing)
