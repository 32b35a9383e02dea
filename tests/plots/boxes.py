"""The places of a drawn picture's texts: which overlap, and which are cut off."""

from __future__ import annotations

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def texts_of(figure: Figure) -> dict[Text, Bbox]:
    """Every text that is drawn, with its place in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden: set[Text] = set()
    for axes in figure.axes:
        frame = axes.get_window_extent()
        for axis, low, high in ((axes.xaxis, frame.x0, frame.x1), (axes.yaxis, frame.y0, frame.y1)):
            side = "x" if axis is axes.xaxis else "y"
            for label in [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]:
                box = label.get_window_extent()
                middle = (getattr(box, f"{side}0") + getattr(box, f"{side}1")) / 2
                if not low - 2 <= middle <= high + 2:  # of a tick outside the limits
                    hidden.add(label)
        if not axes.axison:
            hidden |= {text for axis in (axes.xaxis, axes.yaxis) for text in axis.findobj(Text)}
    found = {}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            found[text] = text.get_window_extent()
    return found


def faults(figure: Figure) -> list[str]:
    """Pairs of texts that overlap by more than a pixel, and texts that are cut off by the picture's edge."""
    found = texts_of(figure)
    width, height = figure.canvas.get_width_height()
    cut = [
        f"{text.get_text()!r} is cut off"
        for text, box in found.items()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    pairs = [
        f"{a.get_text()!r} overlaps {b.get_text()!r}"
        for (a, one), (b, two) in combinations(found.items(), 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]
    return cut + pairs


def smallest_letters(figure: Figure) -> float:
    """Points."""
    return min(text.get_fontsize() for text in texts_of(figure))
