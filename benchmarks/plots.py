"""Plots of measured points: panels side by side, one line per implementation, one legend."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner import Point

# Colours that colour-blind readers can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Panel:
    """lines: implementation -> points (x, y). x is logarithmic; y is too if y_log, else it starts at 0."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    y_log: bool = True


def lines(
    points: Iterable[Point], x: Callable[[Point], float], y: Callable[[Point], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """One line per implementation. Of several points at the same x the last counts, the newest of a CSV file."""
    found: dict[str, dict[float, float]] = {}
    for point in points:
        value = y(point)
        if value is not None:
            found.setdefault(point.implementation, {})[x(point)] = value
    return {name: sorted(line.items()) for name, line in found.items()}


def mebibytes(point: Point) -> float | None:
    return None if point.extra_bytes is None else point.extra_bytes / 2**20


def save_panels(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Write a PNG. ValueError if there are no points."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [panel for panel in panels if panel.lines]
    if not panels:
        raise ValueError("no points to draw")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = dict(zip(names, COLOURS * len(names)))
    figure, row = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 2.2, 3.9), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(row[0], panels, strict=True):
        for name, line in panel.lines.items():
            axes.plot(*zip(*line), color=colours[name], marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_short)
        if panel.y_log:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(_short)
        else:
            axes.set_ylim(0, None)
        axes.set_title(panel.title, fontsize=10)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Line2D([], [], color=colours[name], marker="o", markersize=4) for name in names]
    figure.legend(handles, names, loc="outside right center", frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _short(value: float, _position: int) -> str:
    """1024 as 1k, 1048576 as 1M."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
