"""Numbers on axes: units, ticks of logarithmic axes, and data that no axis can show."""

import math

import pytest
from matplotlib.figure import Figure

from retnet.plots.axes import LEAST_SPAN, MOST_TICKS, linear_axis, log_axis, log_ticks, spanned
from retnet.plots.numbers import bytes_of, plain, short


def drawn(values, form=plain, base=10):
    figure = Figure()
    axes = figure.subplots()
    axes.plot(range(len(values)), values, "o")
    log_axis(axes, "y", form, base=base)
    figure.canvas.draw()
    return axes


@pytest.mark.parametrize("low", [1e-9, 0.7, 3.0, 1234.5, 1e12])
@pytest.mark.parametrize("factor", [1.0, 1.02, 3.0, 50.0, 1e5, 1e12])
@pytest.mark.parametrize("base", [2, 10])
def test_a_logarithmic_axis_has_two_to_seven_round_ticks_inside(low, factor, base):
    ends = spanned(low, low * factor)
    assert ends[0] < low <= low * factor < ends[1]
    assert ends[1] / ends[0] >= LEAST_SPAN
    ticks = log_ticks(*ends, base)
    assert 2 <= len(ticks) <= MOST_TICKS
    assert ends[0] <= ticks[0] < ticks[-1] <= ends[1]


def test_bytes_on_a_logarithmic_axis_are_labelled_with_binary_units():
    axes = drawn([190 * 1024, 3 * 2**30], bytes_of, base=2)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) >= 2
    assert all(label.split()[1] in ("KiB", "MiB", "GiB") and float(label.split()[0]).is_integer() for label in labels)


@pytest.mark.parametrize("values", [[], [math.nan], [math.nan, 5.0], [5.0], [0.0, 5.0], [0.0], [1.0, math.inf]])
def test_data_that_a_logarithmic_axis_cannot_show_leaves_a_valid_axis(values):
    axes = drawn(values)
    low, high = axes.get_ylim()
    assert 0 < low < high < math.inf
    assert len(axes.get_yticks()) >= 2


def test_a_linear_axis_has_no_offset_and_no_power_of_ten():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([172e6, 172.1e6], [1, 2])
    linear_axis(axes, "x", short)
    figure.canvas.draw()
    assert axes.xaxis.get_offset_text().get_text() == ""
    assert all(label.get_text().endswith("M") for label in axes.get_xticklabels())


@pytest.mark.parametrize("highest", [0, 16 * 2**20, 3.9 * 2**30, 4 * 2**30, math.nan])
def test_bytes_on_a_linear_axis_are_whole_binary_units(highest):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [0, highest])
    linear_axis(axes, "y", bytes_of)
    axes.set_ylim(0, max(highest, 1) if highest == highest else 1)
    figure.canvas.draw()
    if highest > 0:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert 3 <= len(labels) <= 7
        assert all(float(label.split()[0]).is_integer() for label in labels)
