"""Frames of pictures: one width, one font size, a title with the facts under it, and a legend below.

A picture is 830 pixels wide where it is read (README, pages of the documentation), and stored with twice as many. Its
smallest letters are 8 points, 11 pixels there. The background is white in a dark page too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from retnet.plots.palette import FAINT, GRID, INK, PAPER, Fill, Look
from retnet.system.extras import needs

with needs("plots", "A picture"):
    from matplotlib import rc_context
    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.transforms import Bbox

WIDTH, DPI = 8.3, 200  # inches; pixels per inch
MARGIN = 0.1  # inches
SMALL, NORMAL, LARGE = 8.0, 9.0, 13.0  # points
SEPARATOR = " · "
MOST_CHARACTERS = 240  # of a title, and of the facts under it
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": NORMAL,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": NORMAL + 1,
    "figure.dpi": 100,
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": NORMAL,
    "grid.color": GRID,
    "legend.fontsize": NORMAL,
    "legend.frameon": False,
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "retnet",
    "text.color": INK,
    "text.parse_math": False,  # a model may be named $x$
    "xtick.color": FAINT,
    "xtick.labelsize": SMALL,
    "ytick.color": FAINT,
    "ytick.labelsize": SMALL,
}
P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that draws: everything that it creates has the project's fonts, sizes and colours."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def facts(*parts: str | None) -> str:
    """'NVIDIA H200 · bfloat16 · torch 2.11': the parts that are given."""
    return SEPARATOR.join(part for part in parts if part)


def framed(height: float, title: str, under: str = "") -> Figure:
    """A figure with `height` inches for its panels below a title and a line of facts (`under`), both wrapped.

    The title names the quantity and the model; the facts are hardware, dtype, versions, sizes or dates.
    """
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    top, texts = MARGIN, []
    for text, size, weight, colour in ((title, LARGE, "bold", INK), (under, NORMAL, "normal", FAINT)):
        for line in _wrapped(figure, text, size, weight):
            texts.append((top, figure.text(0, 0, line, fontsize=size, fontweight=weight, color=colour, va="top")))
            top += 1.45 * size / 72
    head = top + 0.05 if texts else 0.0
    figure.set_size_inches(WIDTH, height + head)
    for place, text in texts:
        text.set_position((MARGIN / WIDTH, 1 - place / (height + head)))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, height / (height + head)), h_pad=0.06, w_pad=0.06)
    return figure


def _wrapped(figure: Figure, text: str, size: float, weight: str) -> list[str]:
    """Lines that fit into the figure, broken at spaces, or inside a word that is too long by itself."""
    text, width = printable(text), 150
    text = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
    while text:
        lines = textwrap.wrap(text, width)
        drawn = [figure.text(0, 0, line, fontsize=size, fontweight=weight) for line in lines]
        widest = max(_inches(figure, one).width for one in drawn)
        for one in drawn:
            one.remove()
        if widest <= WIDTH - 2 * MARGIN:
            return lines
        width = min(width - 1, int(width * (WIDTH - 2 * MARGIN) / widest) + 2)
    return []


def printable(text: str) -> str:
    """Text on one line; unprintable characters become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _inches(figure: Figure, artist: Artist) -> Bbox:
    """The place of a text or legend."""
    box = artist.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    return Bbox(box.get_points() / figure.dpi)


def legend(figure: Figure, entries: Mapping[str, Look | Fill | str]) -> None:
    """One legend for all panels, below them and row by row, in as many columns as fit.

    An entry is the look of a line or of an area, or the colour of an area.
    """
    labels = list(entries)
    for columns in range(len(labels), 0, -1):
        order = [label for column in range(columns) for label in labels[column::columns]]  # matplotlib goes by columns
        handles = [_handle(entries[label]) for label in order]
        box = figure.legend(
            handles, order, loc="outside lower center", ncols=columns, columnspacing=1.6, handlelength=2.6
        )
        if columns == 1 or _inches(figure, box).width <= WIDTH - 2 * MARGIN:
            _grow(figure, _inches(figure, box).height)
            return
        box.remove()


def _grow(figure: Figure, inches: float) -> None:
    """Make the figure higher at its foot: panels keep their height, titles their distance from the top."""
    engine, before = figure.get_layout_engine(), figure.get_figheight()
    after = before + inches
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((x, 1 - (1 - y) * before / after))
    assert isinstance(engine, ConstrainedLayoutEngine)  # that of `framed`
    left, bottom, width, height = engine.get()["rect"]
    engine.set(rect=(left, bottom, width, (height * before + inches) / after))
    figure.set_size_inches(WIDTH, after)


def _handle(entry: Look | Fill | str) -> Line2D | Patch:
    if isinstance(entry, Look):
        return Line2D([], [], **entry.line)
    return Patch(color=entry) if isinstance(entry, str) else Patch(**entry.style)


def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format of the path's suffix. Equal pictures give equal bytes.

    Raises ValueError for a format that matplotlib cannot write.
    """
    unstamped = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}, ".pdf": {"CreationDate": None}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # a second layout of the same figure would move its panels a little
        figure.savefig(path, dpi=DPI, metadata=unstamped.get(path.suffix))
