"""The picture of a stack: what its panels show, and that no text covers another."""

import pytest

from retnet.models.cost import mixer_costs
from retnet.plots.frame import SMALL
from retnet.plots.palette import COLOURS, PALE
from retnet.stack.build import model_config
from retnet.stack.picture import SHADE, draw_stack, over_white, save_picture
from retnet.stack.summary import summarize
from tests.plots.boxes import faults, smallest_letters

from .specs import stack

HYENA = "  h:\n    mixer:\n      type: hyena\n    ffn: {type: mlp}\n    state: {kv_cache: false}\n"
NAME = "a-name-of-sixty-characters-that-nobody-would-give-to-a-model"


@pytest.fixture(scope="module")
def drawn():
    found = stack()
    config = model_config(found)
    return found, config, draw_stack(found, config)


def test_the_first_panel_shows_the_parameters_of_mixer_and_feed_forward(drawn):
    found, config, figure = drawn
    panel = figure.axes[0]
    assert (panel.get_title(), panel.get_xlabel()) == ("Parameters per layer", "mixer, then feed-forward")
    widths = [bar.get_width() for bar in panel.patches]
    rows = summarize(found, config)
    assert widths == [n for row in rows for n in (row.mixer_parameters, row.feed_forward_parameters)]


def test_the_second_panel_shows_the_reach_of_each_head(drawn):
    panel = drawn[2].axes[1]
    assert panel.get_title() == "Reach of each head"
    first, second, last = (stairs.get_data() for stairs in panel.patches)
    assert first.values.tolist() == second.values.tolist()
    assert len(first.values) == 4
    assert first.values[0] < first.values[-1] == 256
    assert last.values.tolist() == [16]
    assert first.edges[0] < first.edges[-1] < second.edges[0]  # the first head on top, the axis being inverted


def test_the_third_panel_shows_state_sizes_at_three_contexts(drawn):
    _, config, figure = drawn
    panel = figure.axes[2]
    assert (panel.get_title(), panel.get_xlabel()) == ("State per sequence", "bytes")
    low = panel.get_xlim()[0]
    sizes = [bar.get_width() + low for bar in panel.patches]
    retention, attention = (mixer_costs(config, 256)[i].state_bytes for i in (0, 2))
    assert sizes[:2] == pytest.approx([retention, retention])  # the same at every context
    assert sizes[2:] == pytest.approx([attention, mixer_costs(config, 4)[2].state_bytes])


def test_the_first_layer_is_on_top_and_layers_are_numbered(drawn):
    panel = drawn[2].axes[0]
    low, high = panel.get_ylim()
    assert low > high
    assert [label.get_text() for label in panel.get_yticklabels()] == ["r  0 to 1", "a  2"]
    assert panel.get_yticks().tolist() == [0.5, 2]


def test_the_legend_names_mixers_feed_forward_and_tints(drawn):
    legend = drawn[2].legends[0]
    colours = {text.get_text(): patch.get_facecolor() for text, patch in zip(legend.get_texts(), legend.get_patches())}
    assert set(colours) == {
        *("retnet", "attention", "feed-forward"),
        *(f"state after {n} tokens" for n in (4, 32, 256)),
    }
    assert _hex(colours["retnet"]) == COLOURS["retention"]
    assert _hex(colours["attention"]) == COLOURS["attention"]
    assert _hex(colours["feed-forward"]) == PALE
    assert _hex(colours["state after 4 tokens"]) == SHADE


def _hex(colour):
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])


def test_gated_retention_has_a_colour_and_a_name_of_its_own():
    found = stack(("{chunk_size: 32}", "{chunk_size: 32, vendor.retnet.decay: gated}"))
    figure = draw_stack(found, model_config(found))
    assert _hex(figure.axes[0].patches[0].get_facecolor()) == COLOURS["gated retention"]
    assert "retnet, gated" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_title_names_the_model_and_its_size(drawn):
    assert drawn[2].texts[0].get_text() == "base"
    assert "3 layers · width 64 · 4 heads · context of 256 tokens" in drawn[2].texts[1].get_text()


MIXERS = f"{HYENA}  m:\n    mixer:\n      type: mamba\n    ffn: {{type: mlp}}\n"
CASES = {
    "deep": [("repeat: 2", "repeat: 23"), ("name: base", f"name: {NAME}")],
    "one layer": [("- {template: r, repeat: 2}\n- template: a", "- template: r"), ("n_heads: 4", "n_heads: 1")],
    "all mixers": [
        ("layer_schedule:\n", f"{MIXERS}layer_schedule:\n"),
        ("- template: a\n", "- {template: a}\n- {template: h}\n- {template: m}\n"),
        ("max_seq_len: 256", "max_seq_len: 1048576"),
    ],
}
LARGE = {
    "every other layer": [("- {template: r, repeat: 2}\n- template: a\n", "- {template: r}\n- {template: a}\n" * 80)],
    "long names": [
        ("  r:\n", "  a_template_of_thirty_characters:\n"),
        ("{template: r, repeat: 2}", "{template: a_template_of_thirty_characters, repeat: 120}"),
    ],
}


@pytest.mark.parametrize(
    "pairs", [*CASES.values(), *(pytest.param(x, marks=pytest.mark.slow) for x in LARGE.values())], ids=[*CASES, *LARGE]
)
def test_no_text_covers_another_or_is_cut_off(pairs):
    found = stack(*pairs)
    figure = draw_stack(found, model_config(found))
    assert faults(figure) == []
    assert smallest_letters(figure) >= SMALL
    assert figure.axes[0].get_window_extent().width > 150


def test_equal_pictures_are_equal_files(drawn, tmp_path):
    for name in ("a.svg", "b.svg"):
        save_picture(drawn[2], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(ValueError, match="xyz"):
        save_picture(drawn[2], tmp_path / "a.xyz")


def test_a_tint_is_a_blend_with_white():
    assert over_white("#000000", 1.0) == "#000000"
    assert over_white("#ff0080", 0.5) == "#ff80c0"
