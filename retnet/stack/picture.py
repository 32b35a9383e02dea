"""Pictures of stacks: one row per layer, the first layer on top.

Three panels share the rows: the parameters of the layer (the mixer in its colour, then the feed-forward, and in stripes
the experts that a token does not use), the reach of each head in tokens (a dotted line where the input decides it), and
the size of the layer's state per sequence as the context grows. Lines at the right of the first panel are residual
streams, where a layer has several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path as FilePath

from retnet.models.config import ModelConfig
from retnet.models.cost import mixer_costs, parameter_counts
from retnet.plots.axes import log_ticks
from retnet.plots.frame import NORMAL, SMALL, facts, framed, legend, save, styled
from retnet.plots.numbers import bytes_of, short, tokens
from retnet.plots.palette import DASHES, INK, PALE, Fill, Look
from retnet.system.extras import needs
from retnet.system.sizes import quantity

from .errors import plain
from .load import Stack
from .report import short_count
from .summary import LayerSummary, runs, summarize

with needs("plots", "A picture"):
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

BAND = 0.78  # of a row's height
LEAST_ROW, LARGEST, SMALLEST = 0.19, 9.0, 1.7  # inches: a row's height, and that of all rows together
PARTS = (64, 8, 1)  # of the context, for the sizes of the state
TINTS = (1.0, 0.6, 0.35)  # of a state after these parts of the context
SHADE = "#4a5560"  # of the legend's tints and lines
IDLE = Fill(PALE, striped=True)  # experts that a token does not use
STREAM_WIDTH, MOST_DRAWN = 0.8, 8  # points; lines of residual streams per layer
UNKNOWN = Look(SHADE, DASHES[2], None)  # a reach that depends on the input

Corners = list[tuple[float, float]]
Bar = tuple[Fill, Corners]


def save_picture(figure: Figure, path: FilePath) -> None:
    """Write the picture in the format of the path's suffix. Equal pictures give equal bytes.

    Raises ValueError for a format that matplotlib cannot write.
    """
    save(figure, path)


@styled
def draw_stack(stack: Stack, config: ModelConfig) -> Figure:
    """Draw a stack whose model is `config`; `save_picture` writes the figure."""
    rows, model = summarize(stack, config), stack.spec.model
    context = model.max_seq_len
    under = facts(
        f"{short_count(parameter_counts(config)['total'])} parameters",
        quantity(len(rows), "layer"),
        f"width {model.d_model:,}",
        quantity(model.n_heads, "head"),
        f"context of {tokens(context)} tokens",
    )
    height = min(max(LEAST_ROW * len(rows), SMALLEST), LARGEST)
    figure = framed(height + 0.75, plain(model.name or "stack", 60), under)
    panels = figure.subplots(1, 3, width_ratios=(1.2, 1, 1), sharey=True)
    for axes in panels:
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="both", length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(axis="y", visible=False)
    row_height = height / len(rows)
    has_idle = _parameters(panels[0], rows)
    has_unknown = _reach(panels[1], rows, context, row_height)
    sizes = _states(panels[2], rows, config, context)
    _labels(panels[0], rows, row_height)
    most_streams = _residual_streams(panels[0], rows)
    entries: dict[str, Look | Fill] = dict(row.layer.mixer.family(row.layer.mixer_type) for row in rows)
    entries["feed-forward"] = Fill(PALE)
    if has_idle:
        entries["experts not chosen for a token"] = IDLE
    if has_unknown:
        entries["reach that the input decides"] = UNKNOWN
    if most_streams > 1:
        entries[f"residual streams, up to {most_streams} per layer"] = Look(SHADE, "-", None, STREAM_WIDTH)
    if any(len(set(layer)) > 1 for layer in sizes):
        counts = [max(1, context // part) for part in PARTS]
        entries |= {
            f"state after {tokens(count)} tokens": Fill(over_white(SHADE, tint))
            for count, tint in zip(counts, TINTS, strict=True)
        }
    legend(figure, entries)
    return figure


def _labels(axes: Axes, rows: list[LayerSummary], row_height: float) -> None:
    """Label each run of equal layers with its numbers and name. Labels that would touch the one above are left out."""
    start, last, places = 0, float("-inf"), []
    lines: list[list[tuple[float, float]]] = []
    colours = []
    for count, row in runs(rows):
        middle, end = start + (count - 1) / 2, start + count - 1
        if count > 1:
            lines.append([(-0.02, start - BAND / 2), (-0.02, end + BAND / 2)])
            colours.append(_fill(row).colour)
        if (middle - last) * row_height >= 0.15:
            numbers = str(start) if count == 1 else f"{start} to {end}"
            places.append((middle, f"{plain(row.layer.template, 18)}  {numbers}"))
            last = middle
        start += count
    axes.add_collection(
        LineCollection(lines, colors=colours, transform=axes.get_yaxis_transform(), clip_on=False), autolim=False
    )
    axes.set_yticks([place for place, _ in places], [text for _, text in places], color=INK)
    axes.tick_params(axis="y", pad=8)


def _residual_streams(axes: Axes, rows: list[LayerSummary]) -> int:
    """Draw a line per residual stream along the layers that have several. Returns their largest number."""
    numbers = [row.layer.residual.hyper.expand if row.layer.residual.hyper else 1 for row in rows]
    runs_of = [list(run) for _, run in groupby(range(len(rows)), lambda y: numbers[y])]
    lines = [
        [(1.005 + 0.008 * i, run[0] - BAND / 2), (1.005 + 0.008 * i, run[-1] + BAND / 2)]
        for run in runs_of
        if numbers[run[0]] > 1
        for i in range(min(numbers[run[0]], MOST_DRAWN))
    ]
    axes.add_collection(
        LineCollection(
            lines,
            colors=SHADE,
            linewidths=STREAM_WIDTH,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
            gid="residual streams",
        ),
        autolim=False,
    )
    return max(numbers)


def _parameters(axes: Axes, rows: list[LayerSummary]) -> bool:
    """Draw the parameters of each layer. Returns whether any has experts that a token does not use."""
    bars: list[Bar] = []
    for y, row in enumerate(rows):
        mixer, total = row.mixer_parameters, row.mixer_parameters + row.feed_forward_parameters
        used = total - row.idle_parameters
        bars += [(_fill(row), _bar(y, 0, mixer)), (Fill(PALE), _bar(y, mixer, used)), (IDLE, _bar(y, used, total))]
    _draw(axes, bars)
    axes.set_xlim(0, 1.02 * max(row.mixer_parameters + row.feed_forward_parameters for row in rows))
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_title("Parameters per layer", fontsize=NORMAL)
    axes.set_xlabel("mixer, then feed-forward", fontsize=SMALL)
    return any(row.idle_parameters for row in rows)


def _reach(axes: Axes, rows: list[LayerSummary], context: int, row_height: float) -> bool:
    """Draw areas from one token to the reach, on a logarithmic axis, with one stripe per head.

    A dotted line over the whole context stands for a reach that depends on the input. Returns whether there is any.
    """
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, max(context, 2))
    bars: list[Bar] = []
    unknown = [y for y, row in enumerate(rows) if row.layer.mixer.reach_depends_on_input]
    for y, row in enumerate(rows):
        if row.layer.mixer.reach_depends_on_input:
            continue
        heads = [min(reach, context) for reach in row.reach or (context,)]
        edges = [y - BAND / 2 + BAND * i / len(heads) for i in range(len(heads) + 1)]
        steps = [(reach, edge) for i, reach in enumerate(heads) for edge in edges[i : i + 2]]
        bars.append((_fill(row), [(1, edges[0]), *steps, (1, edges[-1])]))
    _draw(axes, bars)
    axes.add_collection(
        LineCollection(
            [[(1, y), (max(context, 2), y)] for y in unknown],
            colors=[_fill(rows[y]).colour for y in unknown],
            linestyles=[UNKNOWN.dash],
            linewidths=min(UNKNOWN.width, 72 * BAND * row_height / 2),
        ),
        autolim=False,
    )
    ticks = log_ticks(1, max(context, 2), 2, most=5)
    axes.set_xticks(ticks, [tokens(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_title("Reach of each head", fontsize=NORMAL)
    axes.set_xlabel("tokens; a stripe per head, the first on top", fontsize=SMALL)
    return bool(unknown)


def _states(axes: Axes, rows: list[LayerSummary], config: ModelConfig, context: int) -> list[list[int]]:
    """Draw the state sizes after the whole context, and in darker tints after parts of it. Returns them by layer."""
    costs = [mixer_costs(config, max(1, context // part)) for part in PARTS]
    sizes = [[cost.state_bytes for cost in layer] for layer in zip(*costs, strict=True)]
    known = [size for layer in sizes for size in layer if size > 0] or [1]
    low, high = min(known) / 8, max(known) * 1.3
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    bars: list[Bar] = []
    for part in reversed(range(len(PARTS))):  # the largest sizes first, under the darker ones
        for y, (row, layer) in enumerate(zip(rows, sizes, strict=True)):
            if layer[part] not in layer[:part]:  # of equal sizes, the darkest tint is kept
                fill = _fill(row)
                bars.append((replace(fill, colour=over_white(fill.colour, TINTS[part])), _bar(y, low, layer[part])))
    _draw(axes, bars)
    ticks = log_ticks(low, high, 2, most=4)
    axes.set_xticks(ticks, [bytes_of(tick) for tick in ticks])
    axes.minorticks_off()
    grows = any(len(set(layer)) > 1 for layer in sizes)
    axes.set_title("State per sequence", fontsize=NORMAL)
    axes.set_xlabel("bytes" if grows else "bytes, after any number of tokens", fontsize=SMALL)
    return sizes


def _fill(row: LayerSummary) -> Fill:
    return row.layer.mixer.family(row.layer.mixer_type)[1]


def _bar(y: int, left: float, right: float) -> list[tuple[float, float]]:
    """The corners of a bar in row y; [] for none."""
    top, bottom = y - BAND / 2, y + BAND / 2
    return [(left, top), (right, top), (right, bottom), (left, bottom)] if right > left else []


def _draw(axes: Axes, bars: Sequence[Bar]) -> None:
    """Draw areas over one another in this order: one shape per run of one fill, as a shape per bar takes minutes."""
    by_fill: dict[Fill, list[Corners]] = {}
    for fill, corners in bars:
        if corners:
            by_fill.setdefault(fill, []).append(corners)
    for fill, polygons in by_fill.items():
        path = Path.make_compound_path(*(Path([*corners, corners[0]], closed=True) for corners in polygons))
        axes.add_patch(PathPatch(path, **fill.style))


def over_white(colour: str, tint: float) -> str:
    """'#rrggbb' blended with white, as '#rrggbb': like a transparent bar, but hiding the grid."""
    parts = (round(255 - tint * (255 - int(colour[i : i + 2], 16))) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in parts)
