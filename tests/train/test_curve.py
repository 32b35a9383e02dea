"""The loss curve of a run."""

import math

import pytest

from retnet.train.curve import curve_points, draw_loss_curve, save_loss_curve

LOG = [
    {"step": 1, "bits_per_byte": 8.0},
    {"step": 2, "bits_per_byte": 6.0},
    {"step": 2, "eval_bits_per_byte": 7.0},
    {"step": 2, "train_runtime": 1.0},
]


def draw(log, tokens_per_step=100):
    return draw_loss_curve(log, tokens_per_step, title="retnet-tiny on stdlib", under="8 steps")


def labels(figure):
    return [line.get_label() for line in figure.axes[0].lines]


def test_bits_per_byte_are_drawn_over_tokens():
    figure = draw(LOG)
    training, validation = figure.axes[0].lines
    assert labels(figure) == ["training, last 6.000", "validation, last 7.000"]
    assert training.get_xydata().tolist() == [[100, 8.0], [200, 6.0]]
    assert validation.get_xydata().tolist() == [[200, 7.0]]
    assert (training.get_marker(), validation.get_marker()) == ("None", "o")


def test_the_picture_names_the_run_and_its_axes():
    figure = draw(LOG)
    assert [text.get_text() for text in figure.texts] == ["retnet-tiny on stdlib", "8 steps"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("tokens of training", "loss, bits per byte")


def test_without_validation_there_is_one_curve():
    assert labels(draw(LOG[:2])) == ["training, last 6.000"]


def test_a_run_of_one_step_is_a_point_that_can_be_seen():
    figure = draw(LOG[:1])
    assert figure.axes[0].lines[0].get_marker() == "o"
    figure.canvas.draw()


@pytest.mark.parametrize("log", [[], [{"step": 1, "bits_per_byte": math.nan}], [{"step": 1, "learning_rate": 1.0}]])
def test_a_run_without_a_finite_loss_has_an_empty_picture(log, tmp_path):
    assert labels(draw(log)) == []
    save_loss_curve(log, 100, tmp_path / "curve.png", title="run", under="")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_values_that_are_not_finite_are_left_out_and_the_last_validation_of_a_step_counts():
    log = [{"step": n, "eval_bits_per_byte": value} for n, value in ((2, 3.0), (1, 4.0), (2, 2.5), (3, math.inf))]
    assert curve_points(log, "eval_bits_per_byte", 10) == [(10, 4.0), (20, 2.5)]
