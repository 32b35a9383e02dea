"""Looks of the stacks that the mixer recipes compare: the colour of their mixers, dashed with a short convolution."""

from mixers_stacks import PATTERNS

from retnet.plots.palette import Look, look

LOOKS: dict[str, Look] = {
    "attention": look("attention"),
    "RetNet": look("retention"),
    "RetNet + conv": look("retention", 1),
    "gated RetNet": look("gated retention"),
    "gated RetNet + conv": look("gated retention", 1),
    "Mamba-2": look("mamba"),
    "RetNet + attention": look("hybrid"),
    "R R R A + conv": look("hybrid", 1),
    "tri-mixer": look("tri-mixer"),
}
if set(LOOKS) != set(PATTERNS):
    raise AssertionError(f"stacks and looks differ: {sorted(set(LOOKS) ^ set(PATTERNS))}")
