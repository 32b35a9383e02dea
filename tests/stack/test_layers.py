"""The expanded schedule: defaults, overrides, states."""

import pytest

from retnet.stack.layers import keeps_state
from retnet.stack.mixers import Attention, Retnet
from retnet.stack.schema import Template

from .specs import stack


def test_the_schedule_is_expanded_in_order_with_defaults():
    layers = stack().layers
    assert [(layer.index, layer.template, layer.entry) for layer in layers] == [(0, "r", 0), (1, "r", 0), (2, "a", 1)]
    assert layers[0].mixer == Retnet(chunk_size=32)
    assert layers[2].mixer == Attention(window=16)
    assert [layer.activation for layer in layers] == ["swiglu", "swiglu", "gelu"]
    assert all(layer.norm.type == "rmsnorm" and layer.residual.scaling == 1.0 and layer.keeps_state for layer in layers)


def test_an_override_changes_only_its_values_and_only_its_entry():
    override = (
        "{residual: {scaling: 0.5}, attention: {attn_drop: 0.1}, norm: {position: post}, ffn: {activation: relu}}"
    )
    plain, changed = stack(("- template: a", f"- template: a\n- template: a\n  override: {override}")).layers[2:]
    assert changed.mixer == Attention(window=16, attn_drop=0.1)
    assert (changed.norm.type, changed.norm.position) == ("rmsnorm", "post")
    assert (changed.residual.type, changed.residual.scaling) == ("sequential", 0.5)
    assert (plain.activation, changed.activation) == ("gelu", "relu")
    assert (plain.norm.position, plain.residual.scaling) == ("pre", 1.0)


def test_an_override_replaces_a_window_and_null_changes_nothing():
    pairs = ("- template: a", "- {template: a, override: {attention: {window: 64}}}\n- {template: a, override: null}")
    assert [layer.mixer.window for layer in stack(pairs).layers[2:]] == [64, 16]


@pytest.mark.parametrize(
    ("mixer", "state", "kept"),
    [
        ("retnet", None, True), ("retnet", {}, True), ("retnet", {"kv_cache": True}, True),
        ("retnet", {"kv_cache": False}, False), ("attention", {"ssm_state": False}, False), ("mamba", {}, True),
        ("mamba", {"ssm_state": False}, False), ("mamba", {"kv_cache": False}, False), ("hyena", {}, True),
        ("hyena", {"kv_cache": False, "ssm_state": False}, True),
    ],
)  # fmt: skip
def test_state_determines_whether_decoding_carries_the_layers_state(mixer, state, kept):
    template = Template.model_validate({"mixer": {"type": mixer}, "ffn": {"type": "mlp"}, "state": state})
    assert keeps_state(template) is kept
