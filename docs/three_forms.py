"""The picture of the three forms: which products each form of retention computes, and which go through the state.

    python docs/three_forms.py [FOLDER]     draws three_forms.svg, into docs/pictures by default

All three panels are the same T x T table: query n (row) reads key m (column) with weight gamma^(n - m). The forms
differ in how they sum a row: Eq. 5, 6 and 7 of the paper, the last with the in-chunk decay that the printed equation
leaves out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from retnet.plots.frame import NORMAL, SMALL, framed, save, styled
from retnet.plots.palette import COLOURS, FAINT, INK

T, CHUNK, GAMMA = 12, 4, 0.86
BLUE = LinearSegmentedColormap.from_list("retention", ["#dbe9f6", COLOURS["retention"]])
STATE, STATE_FACE, EMPTY = "#9c4a00", "#fbe3d3", "#f4f6f8"


def formula(axes: Axes, x: float, y: float, text: str, colour: str = INK, size: float = NORMAL, **place: str) -> None:
    place = {"ha": "center", "va": "center"} | place
    axes.text(x, y, text, color=colour, fontsize=size, parse_math=True, zorder=4, **place)


def cell(axes: Axes, n: int, m: int, alpha: float = 1.0) -> None:
    colour = to_rgba(BLUE(GAMMA ** (n - m)), alpha)
    axes.add_patch(Rectangle((m, n), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))


def state_box(axes: Axes, x: float, y: float, label: str, width: float = 1.7, height: float = 0.9) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.25",
            facecolor=STATE_FACE, edgecolor=STATE, linewidth=1.2, zorder=3,
        )
    )  # fmt: skip
    formula(axes, x, y, label, STATE)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=7, color=colour, linewidth=1.1, shrinkA=0, shrinkB=0, zorder=2,
            connectionstyle=f"arc3,rad={bend}",
        )
    )  # fmt: skip


def outline(axes: Axes, m: float, n: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((m, n), width, height, fill=False, edgecolor=colour, linewidth=1.6, zorder=3))


def parallel(axes: Axes) -> None:
    for n in range(T):
        for m in range(n + 1):
            cell(axes, n, m)
    axes.text(T / 2, -0.3, "keys m", ha="center", va="bottom", fontsize=SMALL)
    axes.text(-0.4, T / 2, "queries n", ha="right", va="center", rotation=90, fontsize=SMALL)
    formula(axes, 8.6, 2.6, r"$D_{nm} = \gamma^{\,n-m}$", size=NORMAL + 1)


def recurrent(axes: Axes) -> None:
    row = 8
    for n in range(T):
        for m in range(n + 1):
            if n == row and m == row:
                cell(axes, n, m)
            else:
                axes.add_patch(Rectangle((m, n), 1, 1, facecolor=EMPTY, edgecolor="white", linewidth=0.8))
    for m in range(row):
        axes.add_patch(Rectangle((m, row), 1, 1, facecolor=STATE_FACE, edgecolor="white", linewidth=0.8))
    outline(axes, 0, row, row + 1, 1, INK)
    axes.text(row / 2, row + 0.5, "already in the state", ha="center", va="center", color=STATE, fontsize=SMALL)
    x = T - 0.6
    state_box(axes, x, row - 5.4, "$S_{t-1}$", 2.6, 1.3)
    state_box(axes, x, row - 2.0, "$S_t$", 2.6, 1.3)
    arrow(axes, (x, row - 4.7), (x, row - 2.7), STATE)
    formula(axes, x + 0.3, row - 3.7, r"$\times\,\gamma$", STATE, ha="left")
    formula(axes, x - 3.2, row - 3.7, r"$+\;k_t^{\!\top} v_t$")
    arrow(axes, (x - 2.6, row - 3.1), (x - 1.4, row - 2.3), INK)
    arrow(axes, (x, row - 1.3), (x, row + 0.0), STATE)
    formula(axes, x + 0.1, row + 0.6, r"$o_t = q_t S_t$")


def chunkwise(axes: Axes) -> None:
    chunks = T // CHUNK
    for n in range(T):
        for m in range(n + 1):
            if n // CHUNK == m // CHUNK:
                cell(axes, n, m)
            else:
                axes.add_patch(Rectangle((m, n), 1, 1, facecolor=STATE_FACE, edgecolor="white", linewidth=0.8))
    for i in range(chunks):
        outline(axes, i * CHUNK, i * CHUNK, CHUNK, CHUNK, INK)
        if i:
            outline(axes, 0, i * CHUNK, i * CHUNK, CHUNK, STATE)
            formula(axes, i * CHUNK / 2, i * CHUNK + CHUNK / 2, f"$\\gamma^{{j+1}} q_j R_{i}$", STATE)
    x = T - 0.6
    first, second = ((x, i * CHUNK - CHUNK / 2) for i in (1, 2))
    for i, (_, y) in enumerate((first, second), start=1):
        state_box(axes, x, y, f"$R_{i}$", 1.9, 1.3)
        arrow(axes, (i * CHUNK + 0.05, y), (x - 1.0, y), STATE)
    arrow(axes, (x, first[1] + 0.7), (x, second[1] - 0.7), STATE)
    formula(axes, x + 0.2, CHUNK, r"$\times\,\gamma^{C}$", STATE, ha="left")


@styled
def draw() -> Figure:
    under = "T = 12 tokens: query n (row) reads key m (column) with weight γⁿ⁻ᵐ; orange goes through the state"
    figure = framed(3.2, "Three ways to sum the same table", under)
    panels = [
        (parallel, "Parallel", "the whole table at once:\ntraining", r"$(QK^{\top} \odot D)\,V$"),
        (recurrent, "Recurrent", "one token from one state:\ndecoding, O(1) per token",
         r"$S_t = \gamma S_{t-1} + k_t^{\top} v_t$"),
        (chunkwise, "Chunkwise", "blocks on the diagonal, a state for\nthe rest: long sequences, O(T)",
         r"$R_{i} = \gamma^{C} R_{i-1} + \sum_j \gamma^{C-1-j} k_j^{\top} v_j$"),
    ]  # fmt: skip
    for axes, (draw_panel, title, use, rule) in zip(figure.subplots(1, 3), panels, strict=True):
        draw_panel(axes)
        axes.set(xlim=(-1.4, T + 2.0), ylim=(T + 4.2, -2.4), aspect="equal")
        axes.axis("off")
        axes.text(T / 2, -1.7, title, ha="center", va="center", fontsize=NORMAL + 2, fontweight="bold")
        formula(axes, T / 2, T + 1.1, rule, size=NORMAL + 1)
        axes.text(T / 2, T + 3.1, use, ha="center", va="center", fontsize=SMALL + 0.5, color=FAINT)
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures"
    save(draw(), folder / "three_forms.svg")
