"""Frames: titles and legends of any length inside the picture, bytes that repeat, and names with special characters."""

import warnings
from itertools import pairwise

import pytest
from matplotlib import rcParams

from retnet.plots.frame import DPI, WIDTH, facts, framed, legend, save, styled
from retnet.plots.palette import look

LONG = "a-name-of-sixty-characters-that-nobody-would-give-to-a-model"


def boxes(figure):
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in figure.texts]


def inside(figure, box) -> bool:
    width, height = figure.canvas.get_width_height()
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


@styled
def sample(title="Time per token", under="NVIDIA H200 · bfloat16", labels=("one", "two")):
    figure = framed(2.0, title, under)
    for axes in figure.subplots(1, 2):
        axes.plot([1, 2], [1, 2])
        axes.set_title("panel")
    legend(figure, {label: look("attention", i % 4) for i, label in enumerate(labels)})
    return figure


@pytest.mark.parametrize(
    ("title", "under"),
    [
        ("Time per token", ""),
        (f"Time per token of {LONG}", facts(LONG, LONG, "$x^2$ 50% _a_\n\x1b[31m")),
        ("W" * 400, "i" * 3000),
    ],
)
def test_titles_are_wrapped_inside_the_picture_above_the_panels(title, under):
    figure = sample(title, under)
    shown = boxes(figure)
    assert all(inside(figure, box) for box in shown)
    top = max(axes.title.get_window_extent().y1 for axes in figure.axes)
    assert all(box.y0 > top for box in shown)
    assert all(a.y0 >= b.y1 - 1 for a, b in pairwise(shown))
    assert figure.axes[0].get_position().height * figure.get_figheight() > 1.0


@pytest.mark.parametrize("labels", [tuple(f"rival {i}" for i in range(12)), (LONG, LONG + "s", "b")])
def test_a_legend_is_inside_the_picture_below_the_panels(labels):
    figure = sample(labels=labels)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert len(figure.legends) == 1
    assert inside(figure, box)
    assert figure.axes[0].get_position().height * figure.get_figheight() > 1.0  # the legend takes no room from panels
    assert box.y1 < min(axes.xaxis.get_tightbbox().y0 for axes in figure.axes)


def test_the_style_does_not_leak():
    before = dict(rcParams)
    sample()
    assert dict(rcParams) == before


def test_equal_pictures_are_equal_files(tmp_path):
    for name in ("a", "b/b"):
        save(sample(), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b/b.svg").read_bytes()


def test_a_stored_picture_has_twice_the_pixels_of_the_page(tmp_path):
    save(framed(1.0, "title"), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert int.from_bytes(data[16:20]) == round(WIDTH * DPI) == 1660
    assert b"Software" not in data


def test_facts_are_those_that_are_given():
    assert facts("NVIDIA H200", None, "", "bfloat16") == "NVIDIA H200 · bfloat16"


def test_a_format_that_matplotlib_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        save(sample(), tmp_path / "a.xyz")


def test_names_are_shown_as_they_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = sample("$x$ costs $5", labels=("$a$", "b_c"))
        figure.canvas.draw()
    assert figure.texts[0].get_text() == "$x$ costs $5"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$a$", "b_c"]
