"""Geometry of the short convolution's kernels: which tokens and channels a program owns.

A program walks one segment of tokens and keeps its windows in registers, so its size is a matter of registers: channels
per thread, times the width. Its loads in flight hide the memory's latency: rows per step, times programs per
multiprocessor.
"""

from dataclasses import dataclass

import triton

BLOCK = 128  # channels per program: four per thread. With eight, too few programs fit a multiprocessor
LEAST_SEGMENT = 16  # a shorter one would read mostly its neighbours' tokens
ENOUGH_WARPS = 2048  # more do not run faster on a GPU of 132 multiprocessors


@dataclass(frozen=True)
class Geometry:
    """segment: tokens per program. channels: per program, at most. rows: tokens loaded at once. warps: per program."""

    segment: int
    channels: int
    rows: int
    warps: int = 1


def geometry(width: int, tokens: int, channels: int, *, backward: bool) -> Geometry:
    """The geometry for [tokens, channels] in total; small calls have short segments, to occupy the whole GPU."""
    if width > 4:
        chosen = Geometry(segment=128, channels=BLOCK, rows=4 if backward else 8)
    elif backward:
        chosen = Geometry(segment=128, channels=BLOCK, rows=8)
    else:
        chosen = Geometry(segment=64, channels=BLOCK, rows=4)
    return shortened(chosen, tokens, channels)


def shortened(chosen: Geometry, tokens: int, channels: int) -> Geometry:
    """The same with no more channels than there are, and with shorter segments while some processors have no work."""
    BC = min(chosen.channels, triton.next_power_of_2(channels))
    segment, blocks = chosen.segment, triton.cdiv(channels, BC) * chosen.warps
    while segment > LEAST_SEGMENT and triton.cdiv(tokens, segment) * blocks < ENOUGH_WARPS:
        segment //= 2
    return Geometry(segment, BC, chosen.rows, chosen.warps)
