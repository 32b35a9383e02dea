"""Curves as SVG, in the colours of the page around them.

A long curve is drawn as at most one point per `POINT_WIDTH` of the picture: each is the mean of its values, with a band
from the least to the largest of them. Strips without a colour carry the values as tooltips, which need no script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from retnet.plots.numbers import short

POINT_WIDTH = 4
NARROW, WIDE = (490, 190), (760, 260)  # width and height of a picture, in units that are pixels at full width
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 36
DIGITS = 3  # of numbers beside the curves and in the tables of the page
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Curve:
    """One line: its name, its points (x, y), and its class in the page's style sheet.

    marks: whether each point is marked, as where they are few.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    marks: bool = False


def chart(
    curves: Sequence[Curve],
    unit: str,
    x_unit: str,
    label: str,
    *,
    from_zero: bool = False,
    size: tuple[int, int] = NARROW,
) -> str:
    """An <svg> element of all curves over a common axis; "" if none has a point. Values that are not finite are left
    out.

    unit, x_unit: of the axes. label: read by screen readers. from_zero: whether the vertical axis begins at 0.
    """
    finite = [(c, [p for p in c.points if all(map(math.isfinite, p))]) for c in curves]
    most = size[0] // POINT_WIDTH
    thinned = [(curve, _thinned(points, most)) for curve, points in finite if points]
    if not thinned:
        return ""
    xs = [x for _, points in thinned for x, *_ in points]
    lows = [low for _, points in thinned for *_, low, _ in points] + [0.0] * from_zero
    highs = [high for _, points in thinned for *_, high in points]
    x_ticks, y_ticks = _ticks(min(0.0, *xs), max(xs)), _ticks(min(lows), max(highs))
    frame = _Frame(*size, (min(0.0, *xs), max(xs)), (y_ticks[0], y_ticks[-1]))
    parts = [_axes(frame, x_ticks, y_ticks, unit, x_unit)]
    for curve, points in thinned:
        parts.append(_line(frame, curve, points))
    for curve, points in thinned:
        parts.append(_tooltips(frame, curve, points, unit, x_unit))
    inside, kind = "".join(parts), "wide" if size == WIDE else "narrow"
    box = f'class="{kind}" viewBox="0 0 {size[0]} {size[1]}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}">{inside}</svg>'


@dataclass(frozen=True)
class _Frame:
    """The size of a picture, the ranges of its axes, and where their values lie in it."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        return round(_LEFT + _share(value, self.x_range) * (self.width - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(self.height - _BOTTOM - _share(value, self.y_range) * (self.height - _TOP - _BOTTOM), 1)


def _share(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return (value - low) / (high - low) if high > low else 0.5


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float, float, float]]:
    """(x, mean, least, largest) of at most `most` groups of neighbours; x is that of the last of a group."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (group[-1][0], sum(y for _, y in group) / len(group), min(y for _, y in group), max(y for _, y in group))
        for group in groups
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(step * power for step in _STEPS if step * power >= span / 4 * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], unit: str, x_unit: str) -> str:
    left, right, bottom = _LEFT, frame.width - _RIGHT, frame.height - _BOTTOM
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/><text x="{left - 6}" y="{y + 4}" class="end">')
        parts.append(f"{short(value, DIGITS)}</text>")
    for value in x_ticks:
        if value <= frame.x_range[1] * (1 + 1e-9):
            parts.append(f'<text x="{frame.x(value)}" y="{bottom + 15}" class="middle">{short(value, DIGITS)}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="{frame.height - 4}" class="middle faint">{escape(x_unit)}</text>')
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 11 {middle})"'
    parts.append(f'<text x="11" y="{middle}" class="middle faint" {turned}>{escape(unit)}</text>')
    return "".join(parts)


def _line(frame: _Frame, curve: Curve, points: Sequence[tuple[float, float, float, float]]) -> str:
    parts = []
    if any(high > low for *_, low, high in points):
        above = [f"{frame.x(x)} {frame.y(high)}" for x, _, _, high in points]
        below = [f"{frame.x(x)} {frame.y(low)}" for x, _, low, _ in reversed(points)]
        parts.append(f'<path class="band {curve.style}" d="M{"L".join(above + below)}Z"/>')
    if len(points) > 1:
        places = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y, *_ in points)
        parts.append(f'<path class="line {curve.style}" d="M{places}"/>')
    if curve.marks or len(points) == 1:
        parts += [f'<circle class="{curve.style}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="3.5"/>' for x, y, *_ in points]
    return "".join(parts)


def _tooltips(
    frame: _Frame, curve: Curve, points: Sequence[tuple[float, float, float, float]], unit: str, x_unit: str
) -> str:
    """Strips under the pointer: around the marks of a marked curve, over the whole height for the others."""
    parts = []
    for index, (x, y, low, high) in enumerate(points):
        spread = f" (from {short(low, DIGITS)} to {short(high, DIGITS)})" if high > low else ""
        text = f"{curve.name}: {y:.4g} {unit}{spread} at {short(x, DIGITS)} {x_unit}"
        if curve.marks:
            left, top, width, height = frame.x(x) - 6, frame.y(y) - 6, 12.0, 12.0
        else:
            before = frame.x(points[index - 1][0]) if index else frame.x(x) - 3
            after = frame.x(points[index + 1][0]) if index + 1 < len(points) else frame.x(x) + 3
            left, width = (before + frame.x(x)) / 2, (after - before) / 2
            top, height = _TOP, frame.height - _TOP - _BOTTOM
        parts.append(
            f'<rect class="hit" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}">'
            f"<title>{escape(text)}</title></rect>"
        )
    return "".join(parts)
