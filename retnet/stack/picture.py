"""Pictures of stacks: one row per layer, the first layer on top.

Three panels share the rows: the parameters of the layer (the mixer in its colour, then the feed-forward), the reach of
each head in tokens, and the size of the layer's state per sequence as the context grows.
"""

from __future__ import annotations

from pathlib import Path

from retnet.models.config import ModelConfig
from retnet.models.cost import mixer_costs, parameter_counts
from retnet.plots.axes import log_ticks
from retnet.plots.frame import NORMAL, SMALL, facts, framed, legend, save, styled
from retnet.plots.numbers import bytes_of, short, tokens
from retnet.plots.palette import INK, PALE
from retnet.system.extras import needs

from .errors import plain
from .load import Stack
from .report import short_count
from .summary import LayerSummary, runs, summarize

with needs("plots", "A picture"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = 0.78  # of a row's height
LEAST_ROW, LARGEST, SMALLEST = 0.19, 9.0, 1.7  # inches: a row's height, and that of all rows together
PARTS = (64, 8, 1)  # of the context, for the sizes of the state
TINTS = (1.0, 0.6, 0.35)  # of a state after these parts of the context
SHADE = "#4a5560"  # of the legend's tints


def save_picture(figure: Figure, path: Path) -> None:
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
        f"{len(rows)} layer{'' if len(rows) == 1 else 's'}",
        f"width {model.d_model:,}",
        f"{model.n_heads} head{'' if model.n_heads == 1 else 's'}",
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
    _parameters(panels[0], rows)
    _reach(panels[1], rows, context)
    sizes = _states(panels[2], rows, config, context)
    _labels(panels[0], rows, height / len(rows))
    entries: dict[str, str] = dict(row.layer.mixer.family(row.layer.mixer_type) for row in rows)
    entries["feed-forward"] = PALE
    if any(len(set(layer)) > 1 for layer in sizes):
        counts = [max(1, context // part) for part in PARTS]
        entries |= {
            f"state after {tokens(count)} tokens": over_white(SHADE, tint)
            for count, tint in zip(counts, TINTS, strict=True)
        }
    legend(figure, entries)
    return figure


def _labels(axes: Axes, rows: list[LayerSummary], row_height: float) -> None:
    """Label each run of equal layers with its numbers and name. Labels that would touch the one above are left out."""
    start, last, places = 0, float("-inf"), []
    for count, row in runs(rows):
        middle, end = start + (count - 1) / 2, start + count - 1
        colour = row.layer.mixer.family(row.layer.mixer_type)[1]
        if count > 1:
            line = [start - BAND / 2, end + BAND / 2]
            axes.plot([-0.02, -0.02], line, color=colour, transform=axes.get_yaxis_transform(), clip_on=False)
        if (middle - last) * row_height >= 0.15:
            numbers = str(start) if count == 1 else f"{start} to {end}"
            places.append((middle, f"{plain(row.layer.template, 18)}  {numbers}"))
            last = middle
        start += count
    axes.set_yticks([place for place, _ in places], [text for _, text in places], color=INK)
    axes.tick_params(axis="y", pad=8)


def _parameters(axes: Axes, rows: list[LayerSummary]) -> None:
    widest = max(row.mixer_parameters + row.feed_forward_parameters for row in rows)
    for y, row in enumerate(rows):
        mixer, ffn = row.mixer_parameters, row.feed_forward_parameters
        axes.barh(y, mixer, height=BAND, color=row.layer.mixer.family(row.layer.mixer_type)[1], linewidth=0)
        axes.barh(y, ffn, left=mixer, height=BAND, color=PALE, linewidth=0)
    axes.set_xlim(0, 1.02 * widest)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_title("Parameters per layer", fontsize=NORMAL)
    axes.set_xlabel("mixer, then feed-forward", fontsize=SMALL)


def _reach(axes: Axes, rows: list[LayerSummary], context: int) -> None:
    """Draw bars from one token to the reach, on a logarithmic axis, with one stripe per head."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, max(context, 2))
    for y, row in enumerate(rows):
        heads = [min(reach, context) for reach in row.reach or (context,)]
        edges = [y - BAND / 2 + BAND * i / len(heads) for i in range(len(heads) + 1)]
        colour = row.layer.mixer.family(row.layer.mixer_type)[1]
        axes.stairs(heads, edges, orientation="horizontal", baseline=1, fill=True, color=colour, linewidth=0)
    ticks = log_ticks(1, max(context, 2), 2, most=5)
    axes.set_xticks(ticks, [tokens(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_title("Reach of each head", fontsize=NORMAL)
    axes.set_xlabel("tokens; a stripe per head, the first on top", fontsize=SMALL)


def _states(axes: Axes, rows: list[LayerSummary], config: ModelConfig, context: int) -> list[list[int]]:
    """Draw the state sizes after the whole context, and in darker tints after parts of it. Returns them by layer."""
    costs = [mixer_costs(config, max(1, context // part)) for part in PARTS]
    sizes = [[cost.state_bytes for cost in layer] for layer in zip(*costs, strict=True)]
    known = [size for layer in sizes for size in layer if size > 0] or [1]
    low, high = min(known) / 8, max(known) * 1.3
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    for y, (row, layer) in enumerate(zip(rows, sizes, strict=True)):
        colour = row.layer.mixer.family(row.layer.mixer_type)[1]
        tints = dict(zip(reversed(layer), reversed(TINTS), strict=True))  # of equal sizes, the darkest tint is kept
        for size, tint in tints.items():
            if size > low:
                axes.barh(y, size - low, left=low, height=BAND, color=over_white(colour, tint), linewidth=0)
    ticks = log_ticks(low, high, 2, most=4)
    axes.set_xticks(ticks, [bytes_of(tick) for tick in ticks])
    axes.minorticks_off()
    grows = any(len(set(layer)) > 1 for layer in sizes)
    axes.set_title("State per sequence", fontsize=NORMAL)
    axes.set_xlabel("bytes" if grows else "bytes, after any number of tokens", fontsize=SMALL)
    return sizes


def over_white(colour: str, tint: float) -> str:
    """'#rrggbb' blended with white, as '#rrggbb': like a transparent bar, but hiding the grid."""
    parts = (round(255 - tint * (255 - int(colour[i : i + 2], 16))) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in parts)
