"""Colours, dashes and markers: a rival looks the same in every picture.

The colours of any two rivals differ by at least 12 (CIE76) for normal sight and for the three kinds of colour
blindness, and each has a contrast of at least 3 on white and on a dark page. A variant of a rival (with a convolution,
with a static cache) has its colour and another dash and marker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PAPER, INK, FAINT, GRID = "#ffffff", "#1b2733", "#5b6875", "#e6eaee"
PALE = "#d5dbe1"  # fills beside the coloured ones, such as feed-forward layers

COLOURS = {
    "retention": "#0b6cb8",  # with the paper's decay, fixed per head
    "gated retention": "#2b9cc4",
    "attention": "#b8470f",  # softmax attention: Transformers, Llama, KV caches
    "hybrid": "#1f6e43",  # retention with attention in some layers
    "tri-mixer": "#ae3076",  # Mamba-2, retention and attention in turn
    "mamba": "#bc8b00",  # Mamba-2; Mamba-1 is its variant
    "hyena": "#a8877f",
    "flash-linear-attention": "#8d47ea",
    "torchscale": "#8f9148",
    "other": "#6b7683",
}
_MARKERS = {
    "retention": "o",
    "gated retention": "D",
    "attention": "^",
    "hybrid": "P",
    "tri-mixer": "X",
    "mamba": "p",
    "hyena": "<",
    "flash-linear-attention": "s",
    "torchscale": "*",
    "other": "o",
}
_MORE_MARKERS = "vsdh>o^DP<pX*"  # of variants
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.4, 1.2, 1.4)))
VARIANTS = len(_MORE_MARKERS) - 1  # without the rival's own


@dataclass(frozen=True)
class Look:
    """The appearance of one line."""

    colour: str
    dash: Any = "-"
    marker: str | None = "o"
    width: float = 1.8

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of matplotlib's `plot`."""
        return {
            "color": self.colour,
            "linestyle": self.dash,
            "linewidth": self.width,
            "marker": self.marker,
            "markersize": 4.5,
        }


def look(rival: str, variant: int = 0) -> Look:
    """The look of a rival's line; a variant from 1 to `VARIANTS` keeps its colour. Raises ValueError for others."""
    if rival not in COLOURS:
        raise ValueError(f"no rival is named {rival!r}; accepted: {', '.join(COLOURS)}")
    if not 0 <= variant <= VARIANTS:
        raise ValueError(f"the variant is {variant}; accepted: 0 to {VARIANTS}")
    own = _MARKERS[rival]
    markers = own + _MORE_MARKERS.replace(own, "")
    return Look(COLOURS[rival], DASHES[variant % len(DASHES)], markers[variant])


@dataclass(frozen=True)
class Fill:
    """The appearance of an area. striped: with diagonal stripes, as a variant of what has the plain colour."""

    colour: str
    striped: bool = False

    @property
    def style(self) -> dict[str, Any]:
        """Arguments of matplotlib's patches and collections."""
        return {
            "facecolor": self.colour,
            "edgecolor": PAPER,
            "linewidth": 0,
            "hatch": "/////" if self.striped else None,
        }


FLOOR = Look(COLOURS["other"], DASHES[2], None)  # the time or memory that nothing can beat
