"""The loss curve of a run as an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retnet.system.extras import needs

with needs("plots", "The loss curve of training"):
    from matplotlib.figure import Figure

from retnet.plots.axes import linear_axis
from retnet.plots.frame import framed, save, styled
from retnet.plots.numbers import short
from retnet.plots.palette import COLOURS, INK

TRAINING, VALIDATION = "bits_per_byte", "eval_bits_per_byte"  # keys of the Trainer's log


def save_loss_curve(
    log: Sequence[dict[str, Any]], tokens_per_step: float, path: Path, *, title: str, under: str
) -> None:
    """Save `draw_loss_curve` as PNG or SVG, by the suffix of `path`."""
    save(draw_loss_curve(log, tokens_per_step, title=title, under=under), path)


@styled
def draw_loss_curve(log: Sequence[dict[str, Any]], tokens_per_step: float, *, title: str, under: str) -> Figure:
    """Bits per byte against tokens, from the Trainer's log. `under` is written below the title.

    Values that are not finite are left out. Of several validations after the same step, the last counts.
    """
    figure = framed(3.4, title, under)
    axes = figure.subplots()
    drawn = False
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        (TRAINING, "training", {"color": COLOURS["other"], "linewidth": 1.3}),
        (VALIDATION, "validation", {"color": INK, "linewidth": 1.6, "marker": "o", "markersize": 5}),
    )
    for key, label, style in styles:
        line = curve_points(log, key, tokens_per_step)
        if not line:
            continue
        if len(line) == 1:
            style["marker"] = "o"
        counts, values = zip(*line, strict=True)
        axes.plot(counts, values, label=f"{label}, last {values[-1]:.3f}", **style)
        drawn = True
    axes.set(xlabel="tokens of training", ylabel="loss, bits per byte")
    axes.set_xlim(left=0)
    linear_axis(axes, "x", short)
    linear_axis(axes, "y")
    if drawn:
        axes.legend()
    return figure


def curve_points(log: Sequence[dict[str, Any]], key: str, tokens_per_step: float) -> list[tuple[float, float]]:
    """(tokens, finite value of `key`) by step."""
    found = {entry["step"]: entry[key] for entry in log if key in entry}
    return [(step * tokens_per_step, value) for step, value in sorted(found.items()) if math.isfinite(value)]
