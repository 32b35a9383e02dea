"""Pictures of decay masks and windows, computed by the library's own functions.

python docs/decay_pictures.py [FOLDER]     draws decay_masks.png and windows.png, into docs/pictures by default
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from retnet.ops.decay import experiment_log_decay, pairwise_decay, paper_log_decay, running_log_decay, window

HEADS, TOKENS = 4, 128
BLUE, ORANGE = "#0b4f8a", "#c2571a"


def save_masks(path: Path) -> None:
    """D of Eq. 5 for four heads: fixed decay, with a document boundary (a hard reset), and gated per token."""
    generator = torch.Generator().manual_seed(0)
    fixed = paper_log_decay(HEADS)
    per_token = fixed.expand(1, TOKENS, HEADS).clone()
    reset = per_token.clone()
    reset[:, TOKENS // 2] = -torch.inf
    gates = torch.randn(1, TOKENS, HEADS, generator=generator) * 2 + 1
    rows = {
        "fixed (Eq. 8)": per_token,
        "a hard reset at token 64": reset,
        r"gated, $\sigma(x W)^{1/16}$": torch.nn.functional.logsigmoid(gates) / 16,
    }
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    grid = figure.subplots(len(rows), HEADS, sharex=True, sharey=True)
    for line, (name, log_decay) in zip(grid, rows.items()):
        masks = pairwise_decay(*running_log_decay(log_decay, None, TOKENS))[0]
        for head, axes in enumerate(line):
            axes.imshow(masks[head].numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[0, 64, 127], yticks=[0, 64, 127])
        line[0].set_ylabel(f"{name}\n\nquery n")
    for head, axes in enumerate(grid[0]):
        axes.set_title(rf"head {head}, $\gamma$ = {fixed[head].exp():.4f}", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("key m")
    figure.savefig(path, dpi=130)


def save_windows(path: Path) -> None:
    """Left: decay with distance. Right: number of tokens until 1% is left, for both schedules."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    decay_axes, window_axes = figure.subplots(1, 2)
    distance = torch.logspace(0, 4.5, 300)
    for head, log_decay in enumerate(paper_log_decay(8)):
        left = torch.exp(distance * log_decay)
        decay_axes.semilogx(
            distance, left, color=BLUE, alpha=1 - head / 10, label=f"{head}" if head in (0, 7) else None
        )
        decay_axes.text(
            float(-0.7 / log_decay), 0.5, str(head), fontsize=8, ha="center", va="center", backgroundcolor="white"
        )
    decay_axes.axhline(0.01, color=ORANGE, linewidth=1)
    decay_axes.text(1.2, 0.03, "1%", color=ORANGE, fontsize=9)
    decay_axes.set(
        xlabel="distance in tokens", ylabel=r"$\gamma_h^{\,n-m}$", title="Decay with distance, Eq. 8, heads 0 to 7"
    )
    for name, schedule, colour in (
        ("Eq. 8", paper_log_decay, BLUE),
        ("the paper's experiments", experiment_log_decay, ORANGE),
    ):
        windows = [window(x) for x in schedule(16).tolist()]
        window_axes.semilogy(range(16), windows, "o-", color=colour, label=name, markersize=4)
    window_axes.set(xlabel="head (of 16)", ylabel="tokens", title="Window: tokens until 1% is left")
    window_axes.legend()
    for axes in (decay_axes, window_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    save_masks(folder / "decay_masks.png")
    save_windows(folder / "windows.png")
