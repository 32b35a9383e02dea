"""Plots of the mixer recipes: panels side by side, the same colour and marker for a stack in all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixers_stacks import PATTERNS

# Colours that colour-blind readers can tell apart (Okabe and Ito). Lines of hybrids are thicker. Where two lines may
# coincide, the later one is dashed.
_COLOURS = ("#000000", "#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#D55E00", "#009E73", "#8C8C00", "#7F3C8D")
_DASHES = ("-", "-", "--", "-", "-", "--", "-", "--", "-")
STYLE = {
    name: {"color": colour, "linestyle": dash, "linewidth": 2.6 if len(pattern) > 1 else 1.7, "marker": marker}
    for (name, pattern), colour, dash, marker in zip(PATTERNS.items(), _COLOURS, _DASHES, "osDv^P*Xh", strict=True)
}


@dataclass(frozen=True)
class Panel:
    """lines: stack -> points (x, y), or (x, y, lowest, highest) to shade a range. x_base, y_base: base of a logarithmic
    axis; None: linear. limit: an x value to mark, and its label."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, ...]]]
    x_base: int | None = None
    y_base: int | None = None
    y_range: tuple[float, float] | None = None
    markers: bool = True
    limit: tuple[float, str] | None = None


def draw(panels: Sequence[Panel], path: Path, title: str, style: Mapping[str, dict] = STYLE) -> None:
    """Write a PNG with one legend for all panels. style: stack -> arguments of its lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 4.6 * len(panels) + 1.8
    figure, row = pyplot.subplots(1, len(panels), figsize=(width, 4.2), squeeze=False, layout="constrained")
    for axes, panel in zip(row[0], panels, strict=True):
        _draw_lines(axes, panel, style)
        if panel.x_base:
            axes.set_xscale("log", base=panel.x_base)
            axes.xaxis.set_major_formatter("{x:.0f}")
        if panel.y_base:
            axes.set_yscale("log", base=panel.y_base)
            axes.yaxis.set_major_formatter("{x:.0f}")
        if panel.y_range:
            axes.set_ylim(*panel.y_range)
        if panel.limit:
            place, name = panel.limit
            axes.axvline(place, color="#888888", linewidth=1, linestyle=":")
            axes.text(
                place, 0.985, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=8, color="#666"
            )
        axes.set_title(panel.title, fontsize=10)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = row[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _draw_lines(axes, panel: Panel, styles: Mapping[str, dict]) -> None:
    for stack, points in panel.lines.items():
        x, y, *spread = zip(*points, strict=True)
        style = styles[stack] if panel.markers else styles[stack] | {"marker": None}
        axes.plot(x, y, label=stack, markersize=5, **style)
        if spread:
            axes.fill_between(x, *spread, color=style["color"], alpha=0.12, linewidth=0)
