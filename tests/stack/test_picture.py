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


def shapes(patch):
    """The corners of the areas in a patch, each with its first corner again at the end."""
    codes, corners = patch.get_path().codes, patch.get_path().vertices.tolist()
    starts = [i for i, code in enumerate(codes) if code == patch.get_path().MOVETO]
    return [corners[i:j] for i, j in zip(starts, [*starts[1:], len(corners)], strict=True)]


def bars(patch):
    """The areas in a patch, as left, right and middle."""
    return [(min(x), max(x), (min(y) + max(y)) / 2) for x, y in (zip(*shape, strict=True) for shape in shapes(patch))]


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture(scope="module")
def drawn():
    found = stack()
    config = model_config(found)
    return found, config, draw_stack(found, config)


def test_the_first_panel_shows_the_parameters_of_mixer_and_feed_forward(drawn):
    found, config, figure = drawn
    panel = figure.axes[0]
    assert (panel.get_title(), panel.get_xlabel()) == ("Parameters per layer", "mixer, then feed-forward")
    rows = summarize(found, config)
    retention, feed_forward, attention = (bars(patch) for patch in panel.patches)
    assert [right for _, right, _ in retention + attention] == [row.mixer_parameters for row in rows]
    assert [right - left for left, right, _ in feed_forward] == [row.feed_forward_parameters for row in rows]
    assert [round(y) for _, _, y in feed_forward] == [0, 1, 2]


def test_experts_that_a_token_does_not_use_are_striped():
    moe = ("{type: mlp}", "{type: moe, moe: {experts: 8, top_k: 2}}")
    found = stack(moe)
    config = model_config(found)
    figure, row = draw_stack(found, config), summarize(found, config)[2]
    (striped,) = (patch for patch in figure.axes[0].patches if patch.get_hatch())
    [(left, right, y)] = bars(striped)
    assert (round(y), right) == (2, row.mixer_parameters + row.feed_forward_parameters)
    assert right - left == row.idle_parameters == 6 / 8 * 8 * 2 * 64 * 256
    assert "experts not chosen for a token" in labels(figure)
    assert "experts not chosen for a token" not in labels(draw_stack(stack(), model_config(stack())))


def test_the_second_panel_shows_the_reach_of_each_head(drawn):
    panel = drawn[2].axes[1]
    assert panel.get_title() == "Reach of each head"
    retention, attention = panel.patches
    first, second = shapes(retention)
    heads = [x for x, _ in first[1:9:2]]  # from its first corner: two corners per head
    assert len(first) == 11
    assert heads == sorted(heads)  # the first head on top, the axis being inverted
    assert heads[0] < heads[-1] == 256
    assert first[0][1] < first[-2][1] < second[0][1]
    assert bars(attention)[0][:2] == (1, 16)


@pytest.mark.parametrize(
    ("mixer", "is_known"),
    [
        ("type: mamba", False),
        ("type: retnet\n      retnet: {vendor.retnet.decay: gated}", False),
        ("type: retnet\n      retnet: {vendor.retnet.decay: none}", True),
        ("type: attention", True),
    ],
)
def test_a_reach_that_the_input_decides_is_a_dotted_line(mixer, is_known):
    found = stack(("type: attention\n      attention: {window: 16}", mixer))
    figure = draw_stack(found, model_config(found))
    (lines,) = figure.axes[1].collections
    drawn = {round(y) for patch in figure.axes[1].patches for _, _, y in bars(patch)}
    assert drawn == ({0, 1, 2} if is_known else {0, 1})
    assert [segment.tolist() for segment in lines.get_segments()] == ([] if is_known else [[[1, 2], [256, 2]]])
    assert ("reach that the input decides" in labels(figure)) is not is_known


def test_mamba1_and_mamba2_are_told_apart():
    kinds = "type: mamba\n      mamba: {variant: mamba1}"
    found = stack(
        ("type: attention\n      attention: {window: 16}", kinds),
        ("type: retnet\n      retnet: {chunk_size: 32}", "type: mamba"),
    )
    figure = draw_stack(found, model_config(found))
    legend = figure.legends[0]
    hatches = dict(zip(labels(figure), (patch.get_hatch() for patch in legend.get_patches()), strict=False))
    assert hatches["mamba1"]
    assert not hatches["mamba2"]


def test_a_deep_stack_is_drawn_in_a_few_shapes():
    """One shape per layer takes minutes at the most layers that a stack may have."""
    deep = stack(("- {template: r, repeat: 2}\n- template: a\n", "- {template: r}\n- {template: a}\n" * 200))
    figure = draw_stack(deep, model_config(deep))
    assert sum(len(panel.patches) + len(panel.lines) + len(panel.collections) for panel in figure.axes) < 20
    assert len(bars(figure.axes[0].patches[0])) == 200


def test_the_third_panel_shows_state_sizes_at_three_contexts(drawn):
    _, config, figure = drawn
    panel = figure.axes[2]
    assert (panel.get_title(), panel.get_xlabel()) == ("State per sequence", "bytes")
    sizes = {patch.get_facecolor(): [right for _, right, _ in bars(patch)] for patch in panel.patches}
    retention, attention = (mixer_costs(config, 256)[i].state_bytes for i in (0, 2))
    # Retention's is the same at every context; the window of 16 tokens is full after a part of the context.
    assert list(sizes.values()) == [[attention], [retention, retention], [mixer_costs(config, 4)[2].state_bytes]]


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
