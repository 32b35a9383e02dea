"""Block shapes: the numbers that a kernel of retention is compiled with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StateTile:
    """The border-state pass: a [BK, BV] tile of the state, BT tokens per step."""

    BT: int
    BK: int
    BV: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SegmentTile:
    """The segment kernel: BM rows x BO columns, BN tokens per step, contraction in steps of BR (BS for the state)."""

    BM: int
    BN: int
    BR: int
    BS: int
    BO: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SharedTile:
    """The kernels of heads that share x and y: at most `heads` per program, or all of a group where they are summed."""

    heads: int
    warps: int
    sum_warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """All block shapes of one forward and backward pass."""

    segment: int
    state: StateTile
    key_contraction: SegmentTile  # out and dv: contract over K, V columns out
    value_contraction: SegmentTile  # dq and dk: contract over V, K columns out


@dataclass(frozen=True)
class StepTile:
    """A decode step: BV values of one head per program; a single token takes their keys `slab` at a time."""

    BV: int
    slab: int
    warps: int
