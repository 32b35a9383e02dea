"""Curves as SVG: their values are where the axes say, and long curves keep their extremes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from retnet.train.report.chart import NARROW, POINT_WIDTH, Curve, _ticks, chart


def drawn(points: list[tuple[float, float]], **options) -> ElementTree.Element:
    return ElementTree.fromstring(chart([Curve("training", points, "train")], "bits", "tokens", "loss", **options))


def places(svg: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    (path,) = [p for p in svg.iter("path") if kind in p.get("class", "").split()]
    numbers = [float(n) for n in re.findall(r"[-0-9.]+", path.get("d", ""))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_points_lie_where_the_axes_say():
    svg = drawn([(0.0, 2.0), (100.0, 4.0), (200.0, 3.0)])
    (x0, y0), (x1, y1), (x2, y2) = places(svg, "line")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.2)
    labels = [text.text for text in svg.iter("text")]
    assert {"2", "3", "4", "0", "100", "200", "bits", "tokens"} <= set(labels)
    rows = {t.text: float(t.get("y", "")) - 4 for t in svg.iter("text") if t.get("class") == "end"}
    assert rows["2"] == pytest.approx(y0, abs=0.2)
    assert rows["4"] == pytest.approx(y1, abs=0.2)


def test_a_long_curve_is_thinned_with_a_band_that_keeps_its_extremes():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[5000] = (5000.0, 9.0)
    svg = drawn(points)
    most = NARROW[0] // POINT_WIDTH
    assert most / 2 < len(places(svg, "line")) <= most
    band = [y for _, y in places(svg, "band")]
    line = [y for _, y in places(svg, "line")]
    assert min(band) < min(line) - 50
    assert len(chart([Curve("training", points, "train")], "bits", "tokens", "loss")) < 40_000


def test_tooltips_tell_the_values():
    titles = [t.text for t in drawn([(1000.0, 2.5), (2000.0, 2.25)]).iter("title")]
    assert titles == ["training: 2.5 bits at 1k tokens", "training: 2.25 bits at 2k tokens"]


@pytest.mark.parametrize(
    "points",
    [[(0.0, 0.0)], [(5.0, -3.0)], [(1.0, 2.0)] * 3, [(0.0, 1e-300), (1.0, 1e-300)], [(1e15, 1e15), (2e15, -1e15)]],
)
def test_any_finite_points_can_be_drawn(points):
    svg = drawn(points)
    assert not re.search("nan|inf", ElementTree.tostring(svg, "unicode"))


def test_values_that_are_not_finite_are_left_out():
    assert chart([Curve("a", [(1.0, float("nan")), (2.0, float("inf"))], "train")], "", "", "") == ""
    assert len(places(drawn([(0.0, 1.0), (1.0, float("nan")), (2.0, 2.0)]), "line")) == 2


def test_an_axis_from_zero_shows_a_level_at_its_height():
    svg = drawn([(0.0, 90.0), (1.0, 100.0)], from_zero=True)
    assert "0" in [t.text for t in svg.iter("text") if t.get("class") == "end"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (1.234, 1.235), (0, 0), (7, 7), (1e-9, 1e9)])
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 7
