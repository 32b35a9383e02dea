"""Figures: time and memory of a stream; state size, windows and decay masks of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from retnet.eval.meter import Bin
from retnet.layers.hyena import HyenaConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.retention import RetentionConfig
from retnet.layers.softmax_attention import SoftmaxConfig
from retnet.models.config import ModelConfig
from retnet.models.cost import model_cost, parameter_counts, transformer_cache_bytes
from retnet.ops.decay import pairwise_decay, running_log_decay, window
from retnet.plots.axes import linear_axis, log_axis
from retnet.plots.frame import NORMAL, SMALL, facts, framed, save, styled
from retnet.plots.numbers import bytes_of, short, tokens
from retnet.plots.palette import COLOURS, INK, look
from retnet.system.extras import needs
from retnet.system.sizes import format_bytes

with needs("plots", "A picture"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

MASK_TOKENS = 256
MASKS = 4  # heads whose masks are shown
LABELLED_BARS = 8  # more heads than that have an axis with numbers instead
STATE, CACHE = look("retention"), look("attention", 1)
# mixers of a model beside attention -> its rival in pictures; with attention too it is a hybrid
RIVALS = {RetentionConfig: "retention", Mamba1Config: "mamba", Mamba2Config: "mamba", HyenaConfig: "hyena"}


def save_stream_figure(bins: Sequence[Bin], state_bytes: int, path: Path, *, title: str, under: str) -> None:
    """Save `draw_stream` in the format of the path's suffix."""
    save(draw_stream(bins, state_bytes, title=title, under=under), path)


@styled
def draw_stream(bins: Sequence[Bin], state_bytes: int, *, title: str, under: str) -> Figure:
    """Time per token and memory against the tokens generated. `under` is written below the title."""
    figure = framed(2.9, title, under)
    time_axes, memory_axes = figure.subplots(1, 2)
    one = {"marker": "o", "markersize": 4} if len(bins) < 2 else {}
    middle = [bin.first + bin.count / 2 for bin in bins]
    time_axes.plot(middle, [1e3 * bin.seconds_per_token for bin in bins], color=INK, linewidth=1.2, **one)
    time_axes.set(ylabel="ms per token", title="Time per token")
    time_axes.set_ylim(bottom=0)
    linear_axis(time_axes, "y")
    last = [bin.first + bin.count for bin in bins]
    memory_axes.plot(last, [bin.memory_bytes for bin in bins], color=INK, label="the whole process", **one)
    memory_axes.axhline(state_bytes, color=STATE.colour, label=f"the stream's state, {format_bytes(state_bytes)}")
    memory_axes.set(ylabel="memory", title="Memory")
    log_axis(memory_axes, "y", bytes_of, base=2)
    memory_axes.legend()
    for axes in (time_axes, memory_axes):
        axes.set(xlabel="tokens generated")
        linear_axis(axes, "x", short)
    return figure


def save_model_figure(config: ModelConfig, contexts: Sequence[int], path: Path, name: str | None = None) -> None:
    """Save `draw_model` in the format of the path's suffix."""
    save(draw_model(config, contexts, name), path)


@styled
def draw_model(config: ModelConfig, contexts: Sequence[int], name: str | None = None) -> Figure:
    """State against KV cache by context; if a layer has fixed decays, the window of each head and the decay masks of
    the first such layer. name: for the title, instead of the configuration's."""
    first = first_fixed(config)
    under = facts(
        f"{short(parameter_counts(config)['total'])} parameters",
        f"{len(config.layers)} layers",
        f"width {config.d_model:,}",
        f"vocabulary {config.vocab_size:,}",
        _why_no_windows(config) if first is None else None,
    )
    figure = framed(3.0 if first is None else 5.4, name or config.name or "unnamed model", under)
    if first is None:
        _draw_memory(figure.subplots(), config, contexts)
        return figure
    rows = figure.add_gridspec(2, 1, height_ratios=(1.35, 1))
    memory_axes, window_axes = (figure.add_subplot(panel) for panel in rows[0].subgridspec(1, 2))
    _draw_memory(memory_axes, config, contexts)
    _draw_windows(window_axes, *first)
    _draw_masks(figure, rows[1], *first)
    return figure


def _why_no_windows(config: ModelConfig) -> str:
    retention = [layer.mixer for layer in config.layers if isinstance(layer.mixer, RetentionConfig)]
    return (
        "gated decay: each token sets its own" if any(m.decay == "gated" for m in retention) else "no head has a decay"
    )


def rival_of(config: ModelConfig) -> str:
    """The rival whose colour a model has in pictures, by its mixers."""
    kinds = {type(layer.mixer) for layer in config.layers}
    attention = {kind for kind in kinds if issubclass(kind, SoftmaxConfig)}
    named = {RIVALS.get(kind, "other") for kind in kinds - attention}
    if attention:
        return "attention" if not named else "tri-mixer" if {"mamba", "retention"} <= named else "hybrid"
    if named == {"retention"}:
        gated = all(isinstance(x.mixer, RetentionConfig) and x.mixer.decay == "gated" for x in config.layers)
        return "gated retention" if gated else "retention"
    return named.pop() if len(named) == 1 else "other"


def first_fixed(config: ModelConfig) -> tuple[int, torch.Tensor] | None:
    """The first layer that has heads with a fixed decay below 1, and log gamma [H] of its heads."""
    for index, layer in enumerate(config.layers):
        log_decay = layer.mixer.log_decay if isinstance(layer.mixer, RetentionConfig) else None
        if log_decay is not None and bool((log_decay < 0).any()):
            return index, log_decay
    return None


def _draw_memory(axes: Axes, config: ModelConfig, contexts: Sequence[int]) -> None:
    states = [model_cost(config, T).state_bytes for T in contexts]
    caches = [transformer_cache_bytes(config, T) for T in contexts]
    axes.plot(contexts, states, label="this model's state, float32", **look(rival_of(config)).line)
    axes.plot(contexts, caches, label="a Transformer's KV cache, 16 bit", **CACHE.line)
    axes.set(xlabel="context length, tokens", ylabel="bytes per sequence", title="Memory per sequence")
    log_axis(axes, "x", tokens, base=2)
    log_axis(axes, "y", bytes_of, base=2)
    axes.legend(fontsize=SMALL)


def _draw_windows(axes: Axes, layer: int, log_decay: torch.Tensor) -> None:
    axes.set_title("Window: tokens until the decay is below 1%")
    windows = [window(x) for x in log_decay.tolist()]
    bars = {head: w for head, w in enumerate(windows) if w != float("inf")}
    low, high = min(bars.values()), max(bars.values())
    axes.plot(list(bars), list(bars.values()), linestyle="none")  # the extent for the axis; bars begin below it
    log_axis(axes, "y", tokens)
    axes.set_ylim(low / 2, max(high, 4 * low) * 1.6)
    drawn = axes.bar(list(bars), list(bars.values()), color=COLOURS["retention"])
    if len(windows) <= LABELLED_BARS:
        axes.bar_label(drawn, [f"{w:,.0f}" for w in bars.values()], fontsize=SMALL, padding=2)
    step = -(-len(windows) // 16)
    axes.set_xticks(range(0, len(windows), step))
    axes.set(xlim=(-0.7, len(windows) - 0.3), xlabel=f"head of layer {layer}", ylabel="tokens")
    axes.grid(axis="x", visible=False)


def _draw_masks(figure: Figure, place: SubplotSpec, layer: int, log_decay: torch.Tensor) -> None:
    heads = len(log_decay)
    shown = torch.linspace(0, heads - 1, min(heads, MASKS)).round().int().tolist()
    masks = pairwise_decay(*running_log_decay(log_decay, None, MASK_TOKENS))[0]
    row = [figure.add_subplot(panel) for panel in place.subgridspec(1, len(shown))]
    image = None
    for axes, head in zip(row, shown, strict=True):
        image = axes.imshow(masks[head].numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"head {head}, γ = {gamma_text(float(log_decay[head]))}", fontsize=NORMAL)
        axes.set(xticks=[0, MASK_TOKENS - 1], yticks=[0, MASK_TOKENS - 1] if axes is row[0] else [], xlabel="key m")
        axes.grid(visible=False)
    row[0].set_ylabel(f"query n, layer {layer}")
    assert image is not None  # a layer has heads
    bar = figure.colorbar(image, ax=row, shrink=0.9, aspect=14, ticks=[0, 0.5, 1])
    bar.set_label("decay mask γⁿ⁻ᵐ", fontsize=NORMAL, color=INK)


def gamma_text(log_decay: float) -> str:
    """gamma with digits that tell the heads of a layer apart: '0.9688', and '1 − 3.05e-05' near 1."""
    below = -math.expm1(log_decay)
    return f"{1 - below:.4f}" if below == 0 or below >= 5e-4 else f"1 − {below:.3g}"
