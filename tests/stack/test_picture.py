"""The picture of a stack: what its panels show."""

import pytest

from retnet.models.cost import mixer_costs
from retnet.stack.build import model_config
from retnet.stack.picture import draw_stack, save_picture, short_tokens, to_rgb_over_white
from retnet.stack.summary import summarize

from .specs import stack


@pytest.fixture(scope="module")
def drawn():
    found = stack()
    config = model_config(found)
    return found, config, draw_stack(found, config)


def test_the_first_panel_shows_the_parameters_of_mixer_and_feed_forward(drawn):
    found, config, figure = drawn
    panel = figure.axes[0]
    assert panel.get_xlabel() == "parameters of mixer and feed-forward (K)"
    widths = [bar.get_width() for bar in panel.patches]
    rows = summarize(found, config)
    parameters = [n / 1000 for row in rows for n in (row.mixer_parameters, row.feed_forward_parameters)]
    assert widths == pytest.approx(parameters)


def test_the_second_panel_shows_the_reach_of_each_head(drawn):
    panel = drawn[2].axes[1]
    assert panel.get_xlabel() == "reach of each head (tokens, of 256)"
    assert len(panel.patches) == 4 + 4 + 1
    assert panel.patches[-1].get_width() == 16 - 1
    assert max(bar.get_width() for bar in panel.patches) == 256 - 1


def test_the_third_panel_shows_state_sizes_at_three_contexts(drawn):
    _, config, figure = drawn
    panel = figure.axes[2]
    assert panel.get_xlabel() == "state per sequence after 4, 32, 256 tokens"
    low = panel.get_xlim()[0]
    sizes = [bar.get_width() + low for bar in panel.patches]
    retention, attention = (mixer_costs(config, 256)[i].state_bytes for i in (0, 2))
    assert sizes[:2] == pytest.approx([retention, retention])  # the same at every context
    assert sizes[2:] == pytest.approx([attention, mixer_costs(config, 4)[2].state_bytes])


def test_equal_pictures_are_equal_files(drawn, tmp_path):
    for name in ("a.svg", "b.svg"):
        save_picture(drawn[2], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(ValueError, match="xyz"):
        save_picture(drawn[2], tmp_path / "a.xyz")


def test_token_counts_are_shortened_if_that_is_exact():
    assert [short_tokens(n) for n in (512, 1024, 1500, 131072)] == ["512", "1K", "1500", "128K"]


def test_a_shade_is_a_blend_with_white():
    assert to_rgb_over_white("#000000", 1.0) == (0, 0, 0)
    assert to_rgb_over_white("#ff0080", 0.5) == pytest.approx((1, 0.5, 0.751), abs=1e-3)
