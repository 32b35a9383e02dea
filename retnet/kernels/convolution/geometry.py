"""Geometry of the short convolution's kernels: which tokens and channels a program owns.

A program walks one segment of tokens and keeps its windows in registers, so its size is a matter of registers: channels
per thread, times the width. Its loads in flight hide the memory's latency: rows per step, times programs per
multiprocessor. The numbers were measured on an H200. Other architectures keep the channels per thread and the warps per
multiprocessor: a GPU with wider warps has more channels per program, and one that holds few programs at once, more
warps per program.
"""

import math
from dataclasses import dataclass

import triton

from retnet.kernels.architectures import MEASURED, Architecture

LANE_CHANNELS = 4  # channels per thread. With eight, too few programs fit a multiprocessor
LEAST_SEGMENT = 16  # a shorter one would read mostly its neighbours' tokens
ENOUGH_WARPS = 2048  # more do not run faster on a GPU of 132 multiprocessors


@dataclass(frozen=True)
class Geometry:
    """segment: tokens per program. channels: per program, at most. rows: tokens loaded at once. warps: per program."""

    segment: int
    channels: int
    rows: int
    warps: int = 1


def geometry(
    width: int, tokens: int, channels: int, *, backward: bool, hardware: Architecture | None = None
) -> Geometry:
    """The geometry for [tokens, channels] in total; small calls have short segments, to occupy the whole GPU."""
    if width > 4:
        segment, rows = 128, 4 if backward else 8
    elif backward:
        segment, rows = 128, 8
    else:
        segment, rows = 64, 4
    enough = ENOUGH_WARPS
    if hardware is None or hardware.name == MEASURED:
        warps, lanes = 1, 32
    else:
        warps, lanes = warps_per_program(hardware, registers(width, rows, backward)), hardware.lanes
        enough = 16 * hardware.processors
    chosen = Geometry(segment, LANE_CHANNELS * lanes * warps, rows, warps)
    return shortened(chosen, tokens, channels, enough)


def registers(width: int, rows: int, backward: bool) -> int:
    """An upper bound of the registers per thread: weights, windows and loaded rows of its channels, and addresses."""
    return 48 + LANE_CHANNELS * ((4 if backward else 2) * width + (2 if backward else 1) * rows)


def warps_per_program(hardware: Architecture, registers: int) -> int:
    """The fewest warps per program with which a multiprocessor's limit of programs is not what limits its warps."""
    most = min(hardware.warps, hardware.registers // (hardware.lanes * registers))
    return 1 << max(0, math.ceil(most / hardware.programs) - 1).bit_length()


def shortened(chosen: Geometry, tokens: int, channels: int, enough: int = ENOUGH_WARPS) -> Geometry:
    """The same with no more channels than there are, and with shorter segments while some processors have no work."""
    BC = min(chosen.channels, triton.next_power_of_2(channels))
    segment, blocks = chosen.segment, triton.cdiv(channels, BC) * chosen.warps
    while segment > LEAST_SEGMENT and triton.cdiv(tokens, segment) * blocks < enough:
        segment //= 2
    return Geometry(segment, BC, chosen.rows, chosen.warps)
