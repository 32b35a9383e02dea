"""Figures of streams and models: what they show, and that no text covers another."""

from dataclasses import replace

import pytest
import torch

from retnet.eval.figures import draw_model, draw_stream, first_fixed, gamma_text, rival_of
from retnet.eval.meter import Bin
from retnet.layers.attention import AttentionConfig
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.cost import model_cost
from retnet.models.presets import preset, retnet_config
from retnet.plots.frame import SMALL
from retnet.plots.palette import COLOURS
from retnet.stack.resolve import resolve_config
from tests.plots.boxes import faults, smallest_letters, texts_of

CONTEXTS = (512, 2048, 8192, 32768, 131072, 1048576)
NAME = "a-name-of-sixty-characters-that-nobody-would-give-to-a-model"


def config_of(layers, heads, **mixer):
    plain = retnet_config("tiny", layers, 64, heads, vocab_size=257)
    return replace(plain, layers=tuple(replace(x, mixer=replace(x.mixer, **mixer)) for x in plain.layers))


def hybrid(*mixers):
    plain = config_of(len(mixers), 4)
    layers = tuple(replace(x, mixer=mixer or x.mixer) for x, mixer in zip(plain.layers, mixers, strict=True))
    return replace(plain, layers=layers)


GATED = RetentionConfig(4, key_dim=64, value_dim=128, decay="gated")
ATTENTION = AttentionConfig(4, num_kv_heads=4, head_dim=16)
LATENT = LatentAttentionConfig(4, num_kv_heads=4, head_dim=16, latent_dim=32)
MODELS = {
    "24 layers of 16 heads": (config_of(24, 16), NAME),
    "32 heads": (config_of(1, 32), "m"),
    "one head": (config_of(1, 1), "$m$"),
    "gated": (config_of(2, 4, decay="gated"), NAME),
    "no decay": (config_of(2, 4, decay="none"), "m"),
    "one decay": (config_of(2, 4, decay=127 / 128), "m"),
    "attention first": (hybrid(ATTENTION, GATED, None), "m"),
    "attention alone": (hybrid(ATTENTION), "m"),
}
FAST = ("24 layers of 16 heads", "gated", "attention first")


@pytest.mark.parametrize("case", [*FAST, *(pytest.param(x, marks=pytest.mark.slow) for x in MODELS if x not in FAST)])
def test_no_text_of_a_models_picture_covers_another_or_is_cut_off(case):
    figure = draw_model(MODELS[case][0], CONTEXTS, MODELS[case][1])
    assert faults(figure) == []
    assert smallest_letters(figure) >= SMALL
    assert figure.texts[0].get_text() == MODELS[case][1]


def test_memory_is_labelled_in_binary_units_per_sequence():
    config = preset("retnet-125m")
    axes = draw_model(config, CONTEXTS, "retnet-125m").axes[0]
    state, cache = axes.lines
    assert state.get_ydata().tolist() == [model_cost(config, T).state_bytes for T in CONTEXTS]
    assert cache.get_ydata()[-1] > 1000 * state.get_ydata()[-1]
    assert axes.get_ylabel() == "bytes per sequence"
    units = {label.get_text().split()[1] for label in axes.get_yticklabels()}
    assert units == {"MiB", "GiB"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "4K", "16K", "64K", "256K", "1M"]


@pytest.mark.parametrize("heads", [4, 32])
def test_gammas_that_differ_are_printed_with_digits_that_differ(heads):
    log_decay = config_of(1, heads).layers[0].mixer.log_decay
    texts = [gamma_text(x) for x in log_decay.tolist()]
    assert len(set(texts)) == heads
    assert texts[:2] == ["0.9688", "0.9844"]
    assert not any(text.startswith("1.0") for text in texts)
    assert gamma_text(0.0) == "1.0000"
    figure = draw_model(config_of(1, heads), CONTEXTS, "m")
    assert [axes.get_title() for axes in figure.axes[2:4]] == [
        f"head {head}, γ = {texts[head]}" for head in (0, round((heads - 1) / 3))
    ]


def test_labels_of_bars_stand_clear_of_the_bars():
    axes = (figure := draw_model(config_of(1, 8), CONTEXTS, "m")).axes[1]
    places = texts_of(figure)
    bars = [bar.get_window_extent() for bar in axes.patches]
    assert len(axes.texts) == len(bars) == 8
    assert not any(bar.overlaps(places[label]) for label in axes.texts for bar in bars)


def test_masks_have_a_colour_bar_and_name_their_layer():
    figure = draw_model(hybrid(ATTENTION, None), CONTEXTS, "m")
    assert figure.axes[1].get_xlabel() == "head of layer 1"
    assert figure.axes[2].get_ylabel() == "query n, layer 1"
    assert figure.axes[-1].get_ylabel() == "decay mask γⁿ⁻ᵐ"
    mask = figure.axes[2].images[0].get_array()
    assert mask[1, 0] == pytest.approx(1 - 2.0**-5)
    assert mask[0, 1] == 0


def test_the_first_layer_with_a_fixed_decay_is_found():
    layer, log_decay = first_fixed(hybrid(ATTENTION, GATED, None, None))
    assert layer == 2
    assert torch.allclose(log_decay.exp(), 1 - 2.0 ** -torch.arange(5.0, 9, dtype=torch.float64))
    assert first_fixed(hybrid(ATTENTION, GATED)) is None
    assert first_fixed(config_of(1, 4, decay="none")) is None


@pytest.mark.parametrize("count", [0, 1, 250])
def test_a_stream_of_any_length_can_be_drawn(count):
    bins = [Bin(4 * i + 1, 4, 0.004, 400 << 20) for i in range(count)]
    figure = draw_stream(bins, 192 << 10, title=f"Generation by {NAME}", under="float32")
    assert faults(figure) == []
    time, memory = figure.axes
    assert (time.get_ylabel(), time.get_xlabel()) == ("ms per token", "tokens generated")
    assert [line.get_label() for line in memory.lines] == ["the whole process", "the stream's state, 192 KiB"]
    assert all("iB" in label.get_text() for label in memory.get_yticklabels())
    assert count != 1 or time.lines[0].get_marker() == "o"


def test_a_model_without_fixed_decays_has_one_panel_and_says_why():
    figure = draw_model(MODELS["gated"][0], CONTEXTS, "m")
    assert len(figure.axes) == 1
    assert "gated decay: each token sets its own" in figure.texts[1].get_text()


@pytest.mark.parametrize(
    ("config", "rival"),
    [
        (preset("retnet-tiny"), "retention"),
        (preset("retnet-tiny-conv"), "gated retention"),
        (preset("retnet-tiny-hybrid"), "hybrid"),
        (hybrid(ATTENTION, LATENT), "attention"),
        (resolve_config("arch_expert_research_mini"), "tri-mixer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_has_the_colour_of_its_rival(config, rival):
    assert rival_of(config) == rival
    state, cache = draw_model(config, CONTEXTS[:2], "m").axes[0].lines
    assert state.get_color() == COLOURS[rival]
    assert cache.get_color() == COLOURS["attention"]
