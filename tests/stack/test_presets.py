"""The stack presets: in pairs, valid, without warnings, of their stated size."""

import pytest

from retnet.stack.estimate import estimate_parameters
from retnet.stack.presets import load_preset, preset_names, preset_summary, preset_text
from retnet.stack.report import Severity, realism_report

FULL = [name for name in preset_names() if not name.endswith("_mini")]
NAMES = {
    "arch_beginner_gpt2", "arch_beginner_llama", "arch_intermediate_mistral", "arch_intermediate_gemma2",
    "arch_intermediate_qwen_longctx", "arch_advanced_retnet", "arch_advanced_jamba", "arch_advanced_samba",
    "arch_expert_research", "arch_expert_retnet_moe", "arch_expert_striped_hyena",
}  # fmt: skip


def test_every_architecture_has_a_mini_with_the_same_mixers():
    assert set(FULL) == NAMES
    assert set(preset_names()) == NAMES | {f"{name}_mini" for name in NAMES}
    for name in FULL:
        kinds = [
            {(layer.mixer_type, layer.ffn.type) for layer in load_preset(n).layers} for n in (name, f"{name}_mini")
        ]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_valid_without_warnings_and_has_a_summary(name):
    stack = load_preset(name)
    assert stack.spec.model.name == name.replace("_", "-")
    assert [finding for finding in realism_report(stack) if finding.severity is Severity.WARNING] == []
    assert len(preset_summary(name)) > 50
    assert preset_text(name).startswith("# ")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_its_stated_size(name):
    stack = load_preset(name)
    count = estimate_parameters(stack.spec, stack.layers)
    assert 2e5 < count < 3e6 if name.endswith("_mini") else 1e9 < count < 3e9


def test_the_tri_mixer_rotates_its_three_mixers():
    for name, turns in (("arch_expert_research", 8), ("arch_expert_research_mini", 2)):
        layers = load_preset(name).layers
        assert [layer.mixer_type for layer in layers] == ["mamba", "retnet", "attention"] * turns
        assert all(layer.mixer.variant == "mamba2" for layer in layers if layer.mixer_type == "mamba")


def test_an_unknown_preset_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match="arch_beginner_llama"):
        preset_text("arch_beginer_lama")
