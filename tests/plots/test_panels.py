"""Panels of lines: rivals look alike everywhere, points that are missing, and no text over another."""

import math

import pytest
from matplotlib.colors import to_hex

from retnet.plots.frame import SMALL
from retnet.plots.numbers import bytes_of, tokens
from retnet.plots.palette import COLOURS, look
from retnet.plots.panels import Panel, Scale, draw_panels
from tests.plots.boxes import faults, smallest_letters

LENGTHS = Scale("context length, tokens", tokens, 2)
LOOKS = {
    "retnet's engine, writes deferred by 32 tokens": look("retention", 1),
    "transformers' Llama, static cache, compiled": look("attention"),
    "flash-linear-attention": look("flash-linear-attention"),
}
OURS, LLAMA, FLA = LOOKS


def panel(title="Memory per sequence", lines=None, **options):
    lines = lines or {OURS: [(1024, 3e9), (1 << 20, 3e9)], LLAMA: [(1024, 3e9), (131072, 2.6e10)]}
    return Panel(title, LENGTHS, Scale("bytes", bytes_of, 2), lines, **options)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_panels_and_their_legend_do_not_cover_each_other(count):
    figure = draw_panels([panel(limit=(2048, "training length"))] * count, LOOKS, "Generation", "NVIDIA H200")
    assert faults(figure) == []
    assert smallest_letters(figure) >= SMALL
    assert [round(axes.get_window_extent().width) > 130 for axes in figure.axes] == [True] * count


def test_a_line_has_the_colour_of_its_rival_and_the_legend_names_what_is_drawn():
    figure = draw_panels([panel()], LOOKS, "title", "")
    assert [to_hex(line.get_color()) for line in figure.axes[0].lines] == [COLOURS["retention"], COLOURS["attention"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [OURS, LLAMA]


def test_points_that_are_not_finite_and_panels_without_points_are_left_out():
    failed = panel(lines={FLA: [(1024, math.inf)]})
    some = panel(lines={OURS: [(1024, math.nan), (2048, 5e9)], FLA: [(1024, math.inf)]})
    figure = draw_panels([failed, some], LOOKS, "title", "")
    assert len(figure.axes) == 1
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[2048, 5e9]]
    assert faults(figure) == []
    with pytest.raises(ValueError, match="no points to draw"):
        draw_panels([failed], LOOKS, "title", "")


def test_a_single_point_has_a_marker_where_lines_have_none():
    figure = draw_panels([panel(lines={OURS: [(1024, 3e9)]}, markers=False)], LOOKS, "title", "")
    assert figure.axes[0].lines[0].get_marker() == LOOKS[OURS].marker


def test_a_range_is_shaded():
    ranged = Panel(
        "recall", Scale("pairs", log=2), Scale("%", limits=(0, 100)), {OURS: [(8, 50, 40, 60), (16, 5, 4, 7)]}
    )
    axes = draw_panels([ranged], LOOKS, "title", "").axes[0]
    assert len(axes.collections) == 1
    assert axes.get_ylim() == (0, 100)


def test_a_line_without_a_look_is_refused():
    with pytest.raises(ValueError, match="no look for mystery; there is one for "):
        draw_panels([panel(lines={"mystery": [(1, 1)]})], LOOKS, "title", "")
