"""Pictures of decay masks and windows, computed by the library's own functions.

python docs/decay_pictures.py [FOLDER]     draws decay_masks.png and windows.png, into docs/pictures by default
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from retnet.ops.decay import experiment_log_decay, pairwise_decay, paper_log_decay, running_log_decay, window
from retnet.plots.axes import log_axis
from retnet.plots.frame import NORMAL, SMALL, framed, save, styled
from retnet.plots.numbers import tokens
from retnet.plots.palette import COLOURS, FAINT, INK, PAPER, look

HEADS, TOKENS, RESET = 4, 128, 64


@styled
def draw_masks() -> Figure:
    """D of Eq. 5 for four heads: fixed decay, with a document boundary (a hard reset), and gated per token."""
    generator = torch.Generator().manual_seed(0)
    fixed = paper_log_decay(HEADS)
    per_token = fixed.expand(1, TOKENS, HEADS).clone()
    reset = per_token.clone()
    reset[:, RESET] = -torch.inf
    gates = torch.randn(1, TOKENS, HEADS, generator=generator) * 2 + 1
    gated = torch.nn.functional.logsigmoid(gates) / 16
    gammas = [f"γ = {x:.4f}" for x in fixed.exp().tolist()]
    means = [f"mean γ = {x:.4f}" for x in gated[0].mean(0).exp().tolist()]
    rows = (
        ("fixed (Eq. 8)", per_token, gammas),
        (f"reset at token {RESET}", reset, gammas),
        ("gated per token", gated, means),
    )
    under = "4 heads, 128 tokens; gated: γₜ = σ(xₜ W)^(1/16), here of random xₜ W"
    figure = framed(6.4, "Decay masks: the weight of key m for query n", under)
    grid = figure.subplots(len(rows), HEADS, sharex=True, sharey=True)
    image = None
    for line, (name, log_decay, titles) in zip(grid, rows, strict=True):
        masks = pairwise_decay(*running_log_decay(log_decay, None, TOKENS))[0]
        for head, axes in enumerate(line):
            image = axes.imshow(masks[head].numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[0, RESET, TOKENS - 1], yticks=[0, RESET, TOKENS - 1])
            axes.set_title(f"head {head}, {titles[head]}", fontsize=SMALL)
            axes.grid(visible=False)
        line[0].set_ylabel(f"{name}\nquery n")
    for axes in grid[-1]:
        axes.set_xlabel("key m")
    bar = figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.5, aspect=24, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label("weight: the product of γ from m + 1 to n", fontsize=NORMAL, color=INK)
    return figure


@styled
def draw_windows() -> Figure:
    """Left: decay with distance. Right: number of tokens until 1% is left, for both schedules."""
    figure = framed(3.1, "How far back a head sees", "left: 8 heads of Eq. 8; right: both schedules, 16 heads")
    decay_axes, window_axes = figure.subplots(1, 2)
    distance = torch.logspace(0, 4.5, 300)
    for head, log_decay in enumerate(paper_log_decay(8)):
        decay_axes.plot(distance, torch.exp(distance * log_decay), color=COLOURS["retention"], linewidth=1.4)
        decay_axes.text(
            float(-0.7 / log_decay), 0.5, str(head), fontsize=SMALL, ha="center", va="center", color=INK,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.2},
        )  # fmt: skip
    decay_axes.axhline(0.01, color=FAINT, linewidth=1, linestyle="--")
    decay_axes.text(1.1, 0.03, "1%: the window ends", color=FAINT, fontsize=SMALL)
    decay_axes.set(xlabel="distance n − m, tokens", ylabel="weight γⁿ⁻ᵐ", title="Decay with distance, heads 0 to 7")
    log_axis(decay_axes, "x", tokens)
    for variant, (name, schedule) in enumerate(
        (("Eq. 8", paper_log_decay), ("the paper's experiments", experiment_log_decay))
    ):
        windows = [window(x) for x in schedule(16).tolist()]
        window_axes.plot(range(16), windows, label=name, **look("retention", variant).line)
    window_axes.set(xlabel="head", ylabel="tokens", title="Window: tokens until 1% is left")
    log_axis(window_axes, "y", tokens)
    window_axes.legend()
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures"
    save(draw_masks(), folder / "decay_masks.png")
    save(draw_windows(), folder / "windows.png")
