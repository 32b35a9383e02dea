"""Plots of measured points: panels of lines in the looks of `retnet.plots`, with the points' origin under the title."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from runner import Point, origin

from retnet.plots.frame import facts, save
from retnet.plots.numbers import bytes_of, tokens
from retnet.plots.palette import FLOOR, Look, look
from retnet.plots.panels import Panel, Scale, draw_panels

# implementation, as in the rows -> its label and look
RIVALS: dict[str, tuple[str, Look]] = {
    "engine": ("retnet's engine", look("retention")),
    "deferred 32": ("retnet's engine, writes deferred by 32 tokens", look("retention", 1)),
    "sampled": ("retnet's engine, sampling", look("retention", 2)),
    "RetNet": ("retnet", look("retention")),
    "RetNet, writes deferred by 32": ("retnet, writes deferred by 32 tokens", look("retention", 1)),
    "ours": ("retnet", look("retention")),
    "portable": ("retnet, portable kernels", look("retention", 1)),
    "fla": ("flash-linear-attention", look("flash-linear-attention")),
    "llama dynamic": ("transformers' Llama, growing cache", look("attention")),
    "llama static": ("transformers' Llama, static cache, compiled", look("attention", 1)),
    "Transformer, MHA": ("Transformer, as many KV heads as heads", look("attention")),
    "Transformer, GQA 8": ("Transformer, 8 KV heads", look("attention", 1)),
    "cudnn": ("causal attention, cuDNN", look("attention")),
    "flash": ("causal attention, flash", look("attention", 1)),
    "floor": ("floor: weights and states read once", FLOOR),
}
LENGTHS = Scale("context length, tokens", tokens, 2)
BYTES = Scale("bytes", bytes_of, 2)


def lines(
    points: Iterable[Point], x: Callable[[Point], float], y: Callable[[Point], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """One line per implementation, by its label. Of several points at the same x the last counts, the newest of a CSV
    file. A benchmark's other implementations are not drawn."""
    found: dict[str, dict[float, float]] = {}
    for point in points:
        value = y(point)
        if value is not None and point.implementation in RIVALS:
            found.setdefault(RIVALS[point.implementation][0], {})[x(point)] = value
    return {name: sorted(line.items()) for name, line in found.items()}


def last_number(point: Point) -> int:
    """The 512 of the case 'position 512'."""
    return int(point.case.split()[-1])


def save_panels(path: Path, panels: Sequence[Panel], title: str, points: Sequence[Point], *more: str) -> None:
    """Write the panels; the line under the title has `more` and the points' origin. ValueError if nothing is drawn."""
    looks = dict(RIVALS.values())
    save(draw_panels(panels, looks, title, facts(*more, *origin(points))), path)
