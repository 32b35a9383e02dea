"""Plot of document lengths: by number of documents, and by their share of the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet.plots.axes import linear_axis, log_ticks
from retnet.plots.frame import framed, save, styled
from retnet.plots.numbers import short, tokens
from retnet.plots.palette import COLOURS, INK, PALE
from retnet.system.extras import needs

with needs("plots", "A plot of document lengths"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

_BINS_PER_DOUBLING = 4


def save_lengths_plot(lengths: NDArray[np.int64], title: str, under: str, path: Path) -> None:
    """Save `draw_lengths` as PNG or SVG, by the file name."""
    save(draw_lengths(lengths, title, under), path)


@styled
def draw_lengths(lengths: NDArray[np.int64], title: str, under: str) -> Figure:
    """Two histograms over the document length, on a logarithmic axis. `under` is written below the title.

    The upper one counts documents. The lower one shows the share of all tokens in documents of that length, which is
    what a training run sees.
    """
    low, high = np.floor(np.log2(lengths.min())), np.ceil(np.log2(lengths.max() + 1))
    bins = 2.0 ** np.arange(low, high + 1 / _BINS_PER_DOUBLING, 1 / _BINS_PER_DOUBLING)
    figure = framed(4.4, title, under)
    documents, share = figure.subplots(2, sharex=True)
    documents.hist(lengths, bins=bins, color=PALE, edgecolor="none")
    share.hist(lengths, bins=bins, weights=lengths / lengths.sum(), color=COLOURS["retention"])
    documents.set(ylabel="documents per bin", xscale="log")
    share.set(ylabel="share of tokens per bin", xlabel="tokens per document")
    linear_axis(documents, "y", short)
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    share.set_xlim(bins[0], bins[-1])
    share.set_xticks(log_ticks(bins[0], bins[-1], 2))
    share.xaxis.set_major_formatter(lambda x, _: tokens(x))
    share.minorticks_off()
    median = float(np.median(lengths))
    for axes in (documents, share):
        axes.axvline(median, color=INK, linewidth=1, linestyle="--", label=f"median document, {median:,.0f} tokens")
    documents.legend()
    return figure
