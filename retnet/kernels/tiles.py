"""Block shapes of every kernel, by device family, dtype and head size. No sequence length is a key.

`SEGMENT` tokens share one stored state: longer segments move fewer state bytes and do more work on pairs of tokens.
"""

from dataclasses import dataclass

import torch

SEGMENTS = (64, 128, 256)


@dataclass(frozen=True)
class StateTile:
    """The state-only walk: a [BK, BV] tile of the state, BT tokens a step."""

    BT: int
    BK: int
    BV: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SegmentTile:
    """The segment kernel: BM rows x BO columns, BN columns of pairs, contraction in steps of BR (of BS with the state)."""

    BM: int
    BN: int
    BR: int
    BS: int
    BO: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """All block shapes of one forward and backward pass."""

    segment: int
    state: StateTile
    key_contraction: SegmentTile  # out and dv: contract over K, V columns out
    value_contraction: SegmentTile  # dq and dk: contract over V, K columns out


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies operands of this dtype: float32 exactly, never through tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def device_family(device: torch.device) -> str:
    """Which column of the table a device reads: by the shared memory of a block, "small" where nothing is known."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "small"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9 or (major, minor) == (10, 0):
        return "hopper"
    return "small"


def power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def nearest_segment(chunk_size: int) -> int:
    """The supported segment length nearest to a requested chunk size, the shorter one of two as near."""
    return min(SEGMENTS, key=lambda length: (abs(length - chunk_size), length))


def tiles_for(family: str, dtype: torch.dtype, K: int, V: int, chunk_size: int | None) -> Tiles:
    """Block shapes for a device family ("hopper", "ampere", "small"), a dtype and a head size."""
    wide = dtype == torch.float32
    if wide:
        state = StateTile(32, min(power_of_two(K), 64), min(power_of_two(V), 64), 4, 2)
        key, value = (_float32_tile(R, O) for R, O in ((K, V), (V, K)))
    elif family == "hopper":
        state = StateTile(64, min(power_of_two(K), 128), min(power_of_two(V), 128), 8, 3)
        key, value = (_hopper_tile(R, O) for R, O in ((K, V), (V, K)))
    else:
        state = StateTile(32, min(power_of_two(K), 64), min(power_of_two(V), 64), 4, 2)
        key, value = (_small_tile(R, O) for R, O in ((K, V), (V, K)))
    return Tiles(nearest_segment(chunk_size) if chunk_size else _segment(wide, K, V), state, key, value)


def _segment(wide: bool, K: int, V: int) -> int:
    if wide or K * V <= 64 * 128:
        return 64 if wide and K * V <= 128 * 128 else 128
    return 256 if K * V > 128 * 128 else 128


def _float32_tile(R: int, O: int) -> SegmentTile:
    step = min(power_of_two(R), 32)
    return SegmentTile(32, 32, step, step, min(power_of_two(O), 64), 4, 1)


def _small_tile(R: int, O: int) -> SegmentTile:
    step = min(power_of_two(R), 64)
    return SegmentTile(64, 64, step, min(step, 32), min(power_of_two(O), 64), 4, 2)


def _hopper_tile(R: int, O: int) -> SegmentTile:
    if R <= 256:
        return SegmentTile(128, 64, power_of_two(R), min(power_of_two(R), 64), min(power_of_two(O), 256), 8, 2)
    return SegmentTile(128, 128, 64, 64, min(power_of_two(O), 256), 8, 2)
