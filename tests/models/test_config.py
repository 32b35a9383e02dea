"""Configurations: unknown keys are refused, JSON keeps them exactly, parameters are counted."""

import json

import pytest
import torch

from retnet import LanguageModel, ModelConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.cost import head_windows, model_cost, parameter_counts, transformer_cache_bytes
from retnet.models.presets import FORMS, PRESETS, SIZES, preset, retnet_config
from tests.small_models import small_model


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_preset_has_a_form_under_mup():
    for name in PRESETS:
        config, plain = preset(name + "-mup"), preset(name)
        assert (config.name, config.d_model) == (name + "-mup", plain.d_model)
        assert config.mup_base_width == (96 if name.startswith("retnet-tiny") else 256)
        assert config.logit_scale == config.mup_base_width / config.d_model
        assert config.layers == plain.layers  # heads are as wide as the base's
    with pytest.raises(ValueError, match="no preset is named 'retnet-125m-mup-mup'"):
        preset("retnet-125m-mup-mup")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_follow_from_the_widths(name):
    layers, width, heads = SIZES[name]
    norms = layers * 2 * 2 * width + 2 * width
    expected = 50304 * width + layers * 12 * width**2 + norms
    assert parameter_counts(preset(name))["total"] == expected
    assert parameter_counts(preset(name + "-gated"))["total"] == expected + layers * width * heads
    convolved = layers * (width * heads + 4 * 4 * width)
    assert parameter_counts(preset(name + "-conv"))["total"] == expected + convolved
    assert parameter_counts(preset(name + "-hybrid"))["total"] == pytest.approx(expected, rel=0.003)
    mixer = preset(name).layers[0].mixer
    assert (mixer.head_key_dim, mixer.head_value_dim) == (256, 512)


@pytest.mark.parametrize("suffix", FORMS)
def test_tiny_is_about_three_million(suffix):
    assert parameter_counts(preset("retnet-tiny" + suffix))["total"] == pytest.approx(3.07e6, rel=0.02)


@pytest.mark.parametrize("name", ["retnet-tiny", *SIZES])
def test_every_fourth_layer_of_a_hybrid_is_attention_and_so_is_its_last(name):
    layers = preset(name + "-hybrid").layers
    assert [i for i, layer in enumerate(layers) if layer.mixer.kind == "attention"] == (
        [2] if name == "retnet-tiny" else list(range(3, len(layers), 4))
    )


def test_a_counted_forward_agrees_with_the_cost_of_projections():
    """Everything is counted exactly except retention itself, whose operations torch's counter does not see."""
    from torch.utils.flop_counter import FlopCounterMode

    config = retnet_config("counted", 3, 64, 2, vocab_size=100)
    x = torch.zeros(1, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LanguageModel(config)(x)
    cost = model_cost(config, 32)
    retention = sum(2 * (4 * 32 * 64 + 32 * (32 + 64)) for _ in config.layers)
    vectors = 2 * (parameter_counts(config)["layers"] - 3 * 12 * 64**2)
    assert counter.get_total_flops() / 32 == pytest.approx(cost.forward_flops - retention - vectors)


def test_state_is_constant_and_the_cache_is_not():
    config = preset("retnet-1.3b")
    assert model_cost(config, 1_000).state_bytes == model_cost(config, 1_000_000).state_bytes
    assert transformer_cache_bytes(config, 2_000) == 2 * transformer_cache_bytes(config, 1_000)
    small = small_model()
    state = small(torch.zeros(1, 5, dtype=torch.long), carry=True).state
    assert state.nbytes == model_cost(small.config, 5).state_bytes


def test_windows_follow_the_decay():
    config = retnet_config("windows", 1, 32, 2, vocab_size=9)
    assert head_windows(config) == [[146, 293]]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vocab_sise",), 3, r"config\.vocab_sise: unknown key; did you mean 'vocab_size'"),
        (("vocab_size",), "many", r"config\.vocab_size: expected int, got str 'many'"),
        (("vocab_size",), True, "expected int, got bool"),
        (("init",), "magic", "accepted: paper, torchscale, normal"),
        (("layers", 0, "layer", "mixer", "decay"), "papre", "config.layers.0..layer.mixer: decay is 'papre'"),
        (("layers", 0, "layer", "mixer", "kind"), "lstm", r"mixer\.kind: 'lstm' given; accepted: retention"),
        (("layers", 0, "layer", "mixer", "num_heads"), 3, "key_dim is 64 with num_heads 3"),
        (("layers", 0, "repeat"), 0, "repeat is 0"),
        (("layers",), {}, "expected a list"),
        (("bos_token_id",), 900, "bos_token_id is 900; accepted: 0 to 99"),
    ],
)
def test_a_wrong_configuration_is_refused_by_path(path, value, message):
    data = retnet_config("x", 2, 64, 2, vocab_size=100).to_dict()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.5}, "between 0 and 1"),
        ({"decay": (0.9, 0.9, 0.9)}, "one number or 2"),
        ({"decay": "gated", "decay_norm": True}, "decay_norm false"),
        ({"decay": "gated", "learnable_decay": True}, "strictly between 0 and 1"),
        ({"decay": "none", "learnable_decay": True}, "strictly between 0 and 1"),
        ({"decay_scale": 0.0}, "decay_scale is 0.0; accepted: a positive number"),
        ({"head_norm_groups": 3}, "head_norm_groups is 3; accepted: a divisor of num_heads 2, or None"),
        ({"qkv_activation": "silu", "conv_width": 4}, "'none', as conv_activation follows it"),
        ({"key_dim": 6}, "an even number"),
        ({"value_dim": 7}, "a multiple of num_heads"),
    ],
)
def test_a_wrong_retention_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RetentionConfig(**({"num_heads": 2, "key_dim": 16, "value_dim": 16} | options))


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="no preset is named 'retnet-7b'; accepted: retnet-tiny"):
        preset("retnet-7b")
