"""Pictures of stacks: one row per layer, with the first layer at the bottom.

Three panels share the rows: the parameters of the layer (the mixer in its colour, then the feed-forward), the reach of
each head in tokens, and the size of the layer's state per sequence as the context grows.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from retnet.models.config import ModelConfig
from retnet.models.cost import mixer_costs, parameter_counts
from retnet.system.extras import needs
from retnet.system.sizes import format_bytes

from .errors import plain
from .load import Stack
from .report import short_count
from .summary import LayerSummary, runs, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEED_FORWARD, INK, FAINT, GRID = "#d9dee4", "#1b2733", "#8a96a3", "#eceff2"
BAND = 0.78  # of a row's height
KIB = 1024


def draw_stack(stack: Stack, config: ModelConfig) -> "Figure":
    """Draw a stack whose model is `config`; `save_picture` writes the figure."""
    with needs("plots", "A picture"):
        from matplotlib.figure import Figure

    rows = summarize(stack, config)
    height = min(max(0.19 * len(rows), 1.6), 12.0)
    figure = Figure(figsize=(11, height + 1.55))
    top, bottom = 1 - 0.95 / (height + 1.55), 0.6 / (height + 1.55)
    grid = figure.add_gridspec(
        1, 3, width_ratios=(1.25, 1, 1), left=0.15, right=0.985, top=top, bottom=bottom, wspace=0.07
    )
    panels = [figure.add_subplot(grid[0, i]) for i in range(3)]
    context = stack.spec.model.max_seq_len
    _parameters(panels[0], rows)
    _reach(panels[1], rows, context)
    _states(panels[2], rows, config, context)
    for panel in panels:
        _style(panel, len(rows))
    _labels(panels[0], rows)
    _title(figure, stack, rows, config)
    return figure


def save_picture(figure: "Figure", path: Path) -> None:
    """Write the picture in the format of the path's suffix. Equal pictures give equal bytes.

    Raises ValueError for a format that matplotlib cannot write.
    """
    with needs("plots", "A picture"):
        from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "retnet"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _style(axes: "Axes", count: int) -> None:
    axes.set_ylim(-0.5, count - 0.5)
    axes.set_yticks([])
    axes.tick_params(axis="x", colors=FAINT, labelsize=8, length=0, pad=4)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _labels(axes: "Axes", rows: list[LayerSummary]) -> None:
    """Write the name of each run of equal layers to the left of its rows."""
    start, groups = 0, runs(rows)
    for count, row in groups:
        colour, middle = row.layer.mixer.COLOUR, start + (count - 1) / 2
        if count > 1 or len(groups) <= 40:
            text = plain(row.layer.template, 18) + (f"  ×{count}" if count > 1 else "")
            place = {"ha": "right", "va": "center", "transform": axes.get_yaxis_transform(), "clip_on": False}
            axes.text(-0.04, middle, text, color=colour, fontsize=9 if len(rows) < 40 else 7.5, **place)
        if count > 1:
            ends = [start - BAND / 2, start + count - 1 + BAND / 2]
            axes.plot([-0.02, -0.02], ends, color=colour, transform=axes.get_yaxis_transform(), clip_on=False)
        start += count


def _parameters(axes: "Axes", rows: list[LayerSummary]) -> None:
    widest = max(row.mixer_parameters + row.feed_forward_parameters for row in rows)
    unit, name = next(((u, n) for u, n in ((10**9, "G"), (10**6, "M"), (10**3, "K")) if widest >= u), (1, ""))
    for y, row in enumerate(rows):
        mixer, ffn = row.mixer_parameters / unit, row.feed_forward_parameters / unit
        axes.barh(y, mixer, height=BAND, color=row.layer.mixer.COLOUR, linewidth=0)
        axes.barh(y, ffn, left=mixer, height=BAND, color=FEED_FORWARD, linewidth=0)
    axes.set_xlim(0, 1.02 * widest / unit)
    axes.set_xlabel(
        f"parameters of mixer and feed-forward ({name})" if name else "parameters of mixer and feed-forward"
    )


def _reach(axes: "Axes", rows: list[LayerSummary], context: int) -> None:
    """Draw bars from one token to the reach, on a logarithmic axis, with one stripe per head."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, context)
    for y, row in enumerate(rows):
        heads = [min(reach, context) for reach in row.reach or (context,)]
        stripe = BAND / len(heads)
        for i, reach in enumerate(heads):
            bottom = y - BAND / 2 + i * stripe
            axes.barh(bottom, reach - 1, left=1, height=stripe, align="edge", color=row.layer.mixer.COLOUR, linewidth=0)
    axes.set_xticks(*_ticks(context))
    axes.set_xlabel(f"reach of each head (tokens, of {short_tokens(context)})")


def _states(axes: "Axes", rows: list[LayerSummary], config: ModelConfig, context: int) -> None:
    """Draw the state sizes after the whole context, and in darker shades after 1/8 and 1/64 of it."""
    contexts = [max(1, context // part) for part in (1, 8, 64)]
    costs = [mixer_costs(config, tokens) for tokens in contexts]
    sizes = [[cost.state_bytes for cost in layer] for layer in zip(*costs)]
    low, high = min(map(min, sizes)) / 8, max(map(max, sizes)) * 1.3
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    for y, (row, row_sizes) in enumerate(zip(rows, sizes)):
        shades = dict(zip(row_sizes, (0.35, 0.6, 1.0)))  # of equal sizes, the darkest shade is kept
        for size, alpha in shades.items():
            colour = to_rgb_over_white(row.layer.mixer.COLOUR, alpha)
            axes.barh(y, size - low, left=low, height=BAND, color=colour, linewidth=0)
    powers = [2**i for i in range(0, 60, 2) if low <= 2**i <= high]
    ticks = powers[:: max(1, -(-len(powers) // 5))]
    axes.set_xticks(ticks, [format_bytes(tick, digits=3) for tick in ticks])
    axes.minorticks_off()
    grows = any(len(set(row_sizes)) > 1 for row_sizes in sizes)
    shades = (
        f"after {', '.join(short_tokens(tokens) for tokens in reversed(contexts))} tokens" if grows else "of any length"
    )
    axes.set_xlabel(f"state per sequence {shades}")


def to_rgb_over_white(colour: str, alpha: float) -> tuple[float, ...]:
    """'#rrggbb' blended with white: like a transparent bar, but hiding the grid."""
    return tuple(1 - alpha * (1 - int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))


def _ticks(context: int) -> tuple[list[int], list[str]]:
    powers = [2**i for i in range(0, context.bit_length(), max(1, context.bit_length() // 5))]
    return powers, [short_tokens(power) for power in powers]


def _title(figure: "Figure", stack: Stack, rows: list[LayerSummary], config: ModelConfig) -> None:
    model = stack.spec.model
    counts = parameter_counts(config)
    up = 1 - 0.3 / figure.get_figheight()
    name = plain(model.name or "stack", 60)
    figure.text(0.15, up, name, fontsize=15, fontweight="bold", color=INK, va="center")
    sizes = (f"{short_count(counts['total'])} parameters", f"{len(rows)} layers", f"width {model.d_model}")
    line = "   ".join((*sizes, f"{model.n_heads} heads"))
    figure.text(0.15, up - 0.3 / figure.get_figheight(), line, fontsize=10, color=FAINT, va="center")
    x = 0.985
    colours = {row.layer.mixer_type: row.layer.mixer.COLOUR for row in rows}
    for label, colour in [("feed-forward", FEED_FORWARD), *reversed(colours.items())]:
        text = figure.text(x, up, f"■ {label}", fontsize=10, color=colour if label != "feed-forward" else FAINT,
                           ha="right", va="center")  # fmt: skip
        x -= (len(label) + 5) * 0.0078
        text.set_in_layout(False)


def short_tokens(count: int) -> str:
    """32768 -> '32K'."""
    return f"{count // KIB}K" if count >= KIB and count % KIB == 0 else str(count)
