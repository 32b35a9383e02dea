"""The realism report: each rule warns when it should, and only then."""

import pytest

from retnet.models.cost import parameter_counts
from retnet.stack.build import model_config
from retnet.stack.estimate import estimate_parameters
from retnet.stack.report import Severity, realism_report, short_count

from .specs import stack


def warnings(*pairs, more: str = "") -> list[str]:
    report = realism_report(stack(*pairs, more=more))
    return [finding.rule for finding in report if finding.severity is Severity.WARNING]


WIDE = ("d_model: 64", "d_model: 256")  # heads of 64


def test_a_usual_stack_has_no_warnings():
    report = realism_report(stack(WIDE))
    assert [finding.rule for finding in report] == ["param_count_info", "layer_count_info"]
    assert report[1].message == "3 layers: 2 retnet, 1 attention"
    for latent_dim in (16, 192):
        assert warnings(WIDE, ("{window: 16}", f"{{latent_dim: {latent_dim}}}")) == []


@pytest.mark.parametrize(
    ("rule", "pairs", "more"),
    [
        ("head_dim_range", [("d_model: 64", "d_model: 120")], ""),
        ("head_dim_range", [("d_model: 64", "d_model: 1032")], ""),
        ("target_params_mismatch", [WIDE, ("n_heads: 4", "n_heads: 4\n  target_params: 1000000000")], ""),
        ("moe_expert_ratio", [WIDE, ("{type: mlp}", "{type: moe, moe: {experts: 1025, top_k: 1}}")], ""),
        ("moe_expert_ratio", [WIDE, ("{type: mlp}", "{type: moe, moe: {experts: 4, top_k: 1, capacity_factor: 0.4}}")],
         ""),
        ("seq_len_ratio", [WIDE, ("max_seq_len: 256", "max_seq_len: 16385")], ""),
        ("dropout_regularization", [WIDE, ("type: attention\n      attention: {window: 16}", "type: mamba"),
                                    ("repeat: 2", "repeat: 16")], ""),
        ("family_hint_consistency", [WIDE, ("n_heads: 4", "n_heads: 4\n  family_hint: Llama-3")], ""),
        ("family_hint_consistency", [WIDE, ("n_heads: 4", "n_heads: 4\n  family_hint: my-mamba")], ""),
        ("vocab_tokenizer_consistency", [WIDE, ("pretrained: bytes", "pretrained: openai-community/gpt2")], ""),
        ("vocab_tokenizer_consistency", [WIDE, ("pretrained: bytes", "pretrained: google/byt5-small")], ""),
        ("rope_scaling_factor", [WIDE, ("positional: rope", "positional: rope\n  rope_scaling: {factor: 33}")], ""),
        ("window_without_length", [WIDE, ("{window: 16}", "{window_mode: sliding}")], ""),
        ("mla_latent_dim_range", [WIDE, ("{window: 16}", "{latent_dim: 15}")], ""),
        ("mla_latent_dim_range", [WIDE, ("{window: 16}", "{latent_dim: 193}")], ""),
        ("unused_template", [WIDE, ("- template: a", "- template: r")], ""),
        ("reserved_namespace", [WIDE], "vendor.acme.x: 1\n"),
    ],
)  # fmt: skip
def test_a_rule_warns_about_its_cause_and_no_other_does(rule, pairs, more):
    assert warnings(*pairs, more=more) == [rule]


def test_the_target_is_compared_with_the_built_model_and_not_with_the_estimate():
    """EulerStack's estimate has no gate and narrower values of retention, so it is lower."""
    found = stack(WIDE)
    built, estimate = parameter_counts(model_config(found))["total"], estimate_parameters(found.spec, found.layers)
    target = round(built / 1.35)
    assert estimate < 1.2 * target
    for given, rules in ((target, ["target_params_mismatch"]), (round(built / 1.25), [])):
        assert warnings(WIDE, ("n_heads: 4", f"n_heads: 4\n  target_params: {given}")) == rules
    report = realism_report(stack(WIDE, ("n_heads: 4", "n_heads: 4\n  target_params: 10")))
    assert f"the built model has {short_count(built)}" in report[0].message


def test_a_long_context_is_unusual_only_with_attention():
    long = ("max_seq_len: 256", "max_seq_len: 16385")
    assert warnings(WIDE, long, ("- template: a", "- template: r")) == ["unused_template"]


@pytest.mark.parametrize(
    "pairs",
    [
        [("d_model: 64", "d_model: 128")],  # heads of 32
        [("d_model: 64", "d_model: 1024")],  # heads of 256
        [WIDE, ("max_seq_len: 256", "max_seq_len: 16384")],  # 64 times the width
        [WIDE, ("type: attention\n      attention: {window: 16}", "type: mamba"), ("repeat: 2", "repeat: 15")],
        [WIDE, ("{type: mlp}", "{type: moe, moe: {experts: 1024, top_k: 1, capacity_factor: 0.5}}")],
        [WIDE, ("positional: rope", "positional: rope\n  rope_scaling: {factor: 32}")],
    ],
)
def test_the_limits_of_the_rules_are_accepted(pairs):
    assert warnings(*pairs) == []


def test_reserved_keys_are_reported_with_their_place():
    [message] = [
        finding.message for finding in realism_report(stack(WIDE, more="future.x: 1\n")) if "reserved" in finding.rule
    ]
    assert message == "future.x has a reserved prefix and no effect (line 30, column 1)"


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1500, "1.5K"), (2_500_000, "2.5M"), (1_234_567_890, "1.23B")]
)
def test_counts_are_shortened(count, text):
    assert short_count(count) == text
