"""Figures: time and memory of a stream; state size, windows and decay masks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from retnet.eval.meter import Bin
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.cost import head_windows, model_cost, transformer_cache_bytes
from retnet.ops.decay import pairwise_decay, running_log_decay
from retnet.system.extras import needs
from retnet.system.sizes import format_bytes

with needs("plots", "A picture"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MASK_TOKENS = 256
_BLUE, _ORANGE = "#0b4f8a", "#c2571a"


def save_stream_figure(bins: Sequence[Bin], state_bytes: int, path: Path) -> None:
    """Plot ms per token and memory against position."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    middle = [bin.first + bin.count / 2 for bin in bins]
    time_axes.plot(middle, [1e3 * bin.seconds_per_token for bin in bins], color=_BLUE, linewidth=1.2)
    time_axes.set(xlabel="tokens generated", ylabel="ms per token", ylim=(0, None), title="Time per token")
    last = [bin.first + bin.count for bin in bins]
    memory_axes.plot(last, [bin.memory_bytes / 2**20 for bin in bins], color=_BLUE, label="process")
    memory_axes.axhline(state_bytes / 2**20, color=_ORANGE, label=f"state, {format_bytes(state_bytes)}")
    memory_axes.set(xlabel="tokens generated", ylabel="MiB", yscale="log", title="Memory")
    memory_axes.legend()
    _finish(figure, path)


def save_model_figure(config: ModelConfig, contexts: Sequence[int], path: Path) -> None:
    """Plot state against KV cache, the window of each head, and the decay masks of the first retention layer."""
    mixer = next((layer.mixer for layer in config.layers if isinstance(layer.mixer, RetentionConfig)), None)
    log_decay = mixer.log_decay if mixer is not None else None
    heads = 0 if log_decay is None else len(log_decay)
    figure = Figure(figsize=(11, 6 if heads else 3.8), layout="constrained")
    grid = figure.add_gridspec(2 if heads else 1, 1, height_ratios=(1.7, 1)[: 2 if heads else 1])
    upper = figure.add_subfigure(grid[0])
    memory_axes, window_axes = upper.subplots(1, 2)
    _draw_memory(memory_axes, config, contexts)
    _draw_windows(window_axes, config)
    if log_decay is not None:
        lower = figure.add_subfigure(grid[1])
        lower.suptitle(f"Decay masks of the heads, {MASK_TOKENS} tokens", fontsize=11)
        masks = pairwise_decay(*running_log_decay(log_decay, None, MASK_TOKENS))[0]
        shown = torch.linspace(0, heads - 1, min(heads, 8)).round().int().tolist()
        for axes, head in zip(lower.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            axes.imshow(masks[head].numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(rf"{head}: $\gamma$ = {log_decay[head].exp():.4f}", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    _finish(figure, path)


def _draw_memory(axes: Axes, config: ModelConfig, contexts: Sequence[int]) -> None:
    axes.loglog(
        contexts, [model_cost(config, T).state_bytes / 2**20 for T in contexts], color=_BLUE, label="state, float32"
    )
    cache = [transformer_cache_bytes(config, T) / 2**20 for T in contexts]
    axes.loglog(contexts, cache, color=_ORANGE, label="Transformer's KV cache, 16 bit")
    axes.set(xlabel="context, tokens", ylabel="MiB per sequence", title="Memory per sequence")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_windows(axes: Axes, config: ModelConfig) -> None:
    axes.set(xlabel="head", ylabel="tokens", title="Window: tokens until the decay falls below 1%")
    finite = [[w for w in layer if w != float("inf")] for layer in head_windows(config)]
    if not any(finite):
        axes.text(0.5, 0.5, "no fixed decay", ha="center", va="center", transform=axes.transAxes)
        return
    windows = next(layer for layer in finite if layer)
    bars = axes.bar(range(len(windows)), windows, color=_BLUE)
    axes.bar_label(bars, [f"{w:,.0f}" for w in windows], fontsize=8)
    axes.set(yscale="log", ylim=(min(windows) / 2, 2 * max(windows)))
    axes.set_xticks(range(len(windows)))


def _finish(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
