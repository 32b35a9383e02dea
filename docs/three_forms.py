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

T, CHUNK, GAMMA = 12, 4, 0.86
BLUE = LinearSegmentedColormap.from_list("retention", ["#dbe9f6", "#0b4f8a"])
INK, STATE, STATE_FACE, FAINT = "#1b2733", "#c2571a", "#fbe3d3", "#c9d3dc"


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
    axes.text(x, y, label, ha="center", va="center", color=STATE, fontsize=9.5, zorder=4)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=1.1, shrinkA=0, shrinkB=0, zorder=2,
            connectionstyle=f"arc3,rad={bend}",
        )
    )  # fmt: skip


def outline(axes: Axes, m: float, n: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((m, n), width, height, fill=False, edgecolor=colour, linewidth=1.6, zorder=3))


def parallel(axes: Axes) -> None:
    for n in range(T):
        for m in range(n + 1):
            cell(axes, n, m)
    axes.text(T / 2, -0.3, "keys m", ha="center", va="bottom", color=INK, fontsize=9)
    axes.text(-0.5, T / 2, "queries n", ha="right", va="center", rotation=90, color=INK, fontsize=9)
    axes.text(8.1, 2.6, r"$D_{nm} = \gamma^{\,n-m}$", ha="center", color=INK, fontsize=12)


def recurrent(axes: Axes) -> None:
    row = 8
    for n in range(T):
        for m in range(n + 1):
            if n == row and m == row:
                cell(axes, n, m)
            else:
                axes.add_patch(Rectangle((m, n), 1, 1, facecolor="#f4f6f8", edgecolor="white", linewidth=0.8))
    for m in range(row):
        axes.add_patch(Rectangle((m, row), 1, 1, facecolor=STATE_FACE, edgecolor="white", linewidth=0.8))
    outline(axes, 0, row, row + 1, 1, INK)
    axes.text(row / 2, row + 0.5, "already in the state", ha="center", va="center", color=STATE, fontsize=8.5)
    x = T - 0.6
    state_box(axes, x, row - 4.4, "$S_{t-1}$")
    state_box(axes, x, row - 1.9, "$S_t$")
    arrow(axes, (x, row - 3.9), (x, row - 2.4), STATE)
    axes.text(x + 0.35, row - 3.2, r"$\times\,\gamma$", color=STATE, fontsize=10, va="center")
    axes.text(x - 3.0, row - 2.75, r"$+\;k_t^{\!\top} v_t$", color=INK, fontsize=10, va="center", ha="center")
    arrow(axes, (x - 1.9, row - 2.6), (x - 0.9, row - 2.1), INK)
    arrow(axes, (x, row - 1.4), (x, row + 0.15), STATE)
    axes.text(x + 0.05, row + 0.5, r"$o_t = q_t S_t$", color=INK, fontsize=10, va="center", ha="center")


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
            axes.text(
                i * CHUNK / 2,
                i * CHUNK + CHUNK / 2,
                f"$\\gamma^{{j+1}} q_j R_{i}$",
                ha="center",
                va="center",
                color=STATE,
                fontsize=10,
            )
    x = T - 0.6
    first, second = ((x, i * CHUNK - CHUNK / 2) for i in (1, 2))
    for i, (_, y) in enumerate((first, second), start=1):
        state_box(axes, x, y, f"$R_{i}$", width=1.4)
        arrow(axes, (i * CHUNK + 0.05, y), (x - 0.75, y), STATE)
    arrow(axes, (x, first[1] + 0.5), (x, second[1] - 0.5), STATE)
    axes.text(x + 0.25, CHUNK, r"$\times\,\gamma^{C}$", color=STATE, fontsize=10, va="center")


def draw(folder: Path) -> None:
    figure = Figure(figsize=(13.2, 5.3), layout="constrained")
    panels = [
        (parallel, "Parallel", "the whole table at once: training", r"$(QK^{\top} \odot D)\,V$"),
        (recurrent, "Recurrent", "one token from one state: decoding, O(1) per token",
         r"$S_t = \gamma S_{t-1} + k_t^{\top} v_t$"),
        (chunkwise, "Chunkwise", "blocks on the diagonal, a state for the rest: long sequences, O(T)",
         r"$R_{i} = \gamma^{C} R_{i-1} + \sum_j \gamma^{C-1-j} k_j^{\top} v_j$"),
    ]  # fmt: skip
    for axes, (draw_panel, title, use, formula) in zip(figure.subplots(1, 3), panels, strict=True):
        draw_panel(axes)
        axes.set(xlim=(-1.2, T + 1.4), ylim=(T + 2.6, -1.2), aspect="equal")
        axes.axis("off")
        axes.set_title(title, fontsize=15, color=INK, fontweight="bold", pad=2)
        axes.text(T / 2, T + 0.9, formula, ha="center", va="center", fontsize=12.5, color=INK)
        axes.text(T / 2, T + 2.1, use, ha="center", va="center", fontsize=10, color="#51606e")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "three_forms.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
