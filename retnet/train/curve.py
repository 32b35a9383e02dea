"""The loss curve of a run as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retnet.system.extras import needs

with needs("plots", "The loss curve of training"):
    from matplotlib.figure import Figure


def save_loss_curve(log: Sequence[dict[str, Any]], tokens_per_step: float, path: Path) -> None:
    """Plot bits per byte against tokens, from the Trainer's log. The suffix of `path` selects PNG or SVG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("bits_per_byte", "training", "-"), ("eval_bits_per_byte", "validation", "o")):
        points = [(entry["step"] * tokens_per_step, entry[key]) for entry in log if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.4, markersize=5)
    axes.set(xlabel="tokens", ylabel="bits per byte", title="Training and validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
