"""Panels of lines: measured points side by side, one look per rival, one legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from retnet.plots.axes import Form, linear_axis, log_axis
from retnet.plots.frame import SMALL, framed, legend, styled
from retnet.plots.numbers import plain
from retnet.plots.palette import FAINT, Look
from retnet.system.extras import needs

with needs("plots", "A picture"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_HEIGHT = 2.5  # inches
BESIDE = 3  # most panels in a row; four are two rows of two


@dataclass(frozen=True)
class Scale:
    """An axis: its label with the unit, how its numbers are written, and the base of a logarithmic axis (None: linear).

    limits: the ends of the axis, None where the data decides.
    """

    label: str
    form: Form = plain
    log: Literal[2, 10] | None = None
    limits: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Panel:
    """lines: name -> points (x, y), or (x, y, lowest, highest) to shade a range. Points that are not finite are left
    out. limit: an x value to mark, and its label."""

    title: str
    x: Scale
    y: Scale
    lines: Mapping[str, Sequence[tuple[float, ...]]]
    markers: bool = True
    limit: tuple[float, str] | None = None
    finite: Mapping[str, list[tuple[float, ...]]] = field(init=False)

    def __post_init__(self) -> None:
        kept = {name: [p for p in line if all(map(math.isfinite, p))] for name, line in self.lines.items()}
        object.__setattr__(self, "finite", {name: line for name, line in kept.items() if line})


@styled
def draw_panels(panels: Sequence[Panel], looks: Mapping[str, Look], title: str, under: str) -> Figure:
    """The panels that have points, with a legend of the lines in them in the order of `looks`.

    Raises ValueError if there are no points, and for a line without a look.
    """
    panels = [panel for panel in panels if panel.finite]
    if not panels:
        raise ValueError("there are no points to draw; accepted: at least one")
    names = {name for panel in panels for name in panel.finite}
    if unknown := sorted(names - set(looks)):
        raise ValueError(f"no look for {', '.join(unknown)}; there is one for {', '.join(looks)}")
    columns = len(panels) if len(panels) <= BESIDE else 2
    rows = -(-len(panels) // columns)
    figure = framed(rows * PANEL_HEIGHT, title, under)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, panel, looks)
    for axes in list(places)[len(panels) :]:
        axes.axis("off")
    legend(figure, {name: look for name, look in looks.items() if name in names})
    return figure


def _draw(axes: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    for name, look in looks.items():
        if name not in panel.finite:
            continue
        columns = list(zip(*panel.finite[name], strict=True))
        shown = look if panel.markers or len(columns[0]) == 1 else replace(look, marker=None)
        axes.plot(columns[0], columns[1], **shown.line)
        if len(columns) > 2:
            axes.fill_between(columns[0], columns[2], columns[3], color=look.colour, alpha=0.12, linewidth=0)
    _scale(axes, "x", panel.x)
    _scale(axes, "y", panel.y)
    axes.set_xlabel(panel.x.label, fontsize=SMALL)
    axes.set_ylabel(panel.y.label, fontsize=SMALL)
    axes.set_title(panel.title)
    if panel.limit is not None:
        place, text = panel.limit
        axes.axvline(place, color=FAINT, linewidth=1, linestyle=":")
        side = {"ha": "right", "x": place} if place > _middle(axes) else {"ha": "left", "x": place}
        axes.text(y=0.98, s=f" {text} ", transform=axes.get_xaxis_transform(), va="top", fontsize=SMALL, color=FAINT,
                  **side)  # fmt: skip


def _scale(axes: Axes, which: Literal["x", "y"], scale: Scale) -> None:
    if scale.log:
        log_axis(axes, which, scale.form, base=scale.log)
    else:
        linear_axis(axes, which, scale.form)
        getattr(axes, f"set_{which}lim")(*scale.limits)


def _middle(axes: Axes) -> float:
    low, high = axes.get_xlim()
    return math.sqrt(low * high) if axes.get_xscale() == "log" else (low + high) / 2
