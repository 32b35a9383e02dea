"""Plot of document lengths: by number of documents, and by their share of the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BINS_PER_DOUBLING = 4


def save_lengths_plot(lengths: NDArray[np.int64], title: str, path: Path) -> None:
    """Save two histograms over the document length, on a logarithmic axis, as PNG or SVG by the file name.

    The upper one counts documents. The lower one shows the share of all tokens in documents of that length, which is
    what a training run sees.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

    low, high = np.floor(np.log2(lengths.min())), np.ceil(np.log2(lengths.max() + 1))
    bins = 2.0 ** np.arange(low, high + 1 / _BINS_PER_DOUBLING, 1 / _BINS_PER_DOUBLING)
    figure = Figure(figsize=(7, 5), layout="constrained")
    documents, tokens = figure.subplots(2, sharex=True)
    documents.hist(lengths, bins=bins)
    tokens.hist(lengths, bins=bins, weights=lengths / lengths.sum(), color="tab:orange")
    documents.set(title=title, ylabel="documents", xscale="log")
    tokens.set(ylabel="share of tokens", xlabel="tokens per document")
    tokens.xaxis.set_major_locator(LogLocator(base=2 if high - low <= 12 else 4))
    tokens.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    tokens.xaxis.set_minor_locator(LogLocator(base=2, subs=(1.0,)))
    tokens.xaxis.set_minor_formatter("")
    tokens.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    for axes in (documents, tokens):
        axes.grid(alpha=0.3)
        axes.axvline(float(np.median(lengths)), color="black", linewidth=1, linestyle="--", label="median document")
    documents.legend(frameon=False)
    figure.savefig(path, dpi=130)
