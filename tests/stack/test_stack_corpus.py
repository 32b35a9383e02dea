"""The shared corpus of specifications: valid ones load, and faulty ones are refused at the place of the fault."""

import json

import pytest

from retnet.stack import Category, StackError, load_stack
from retnet.stack.estimate import estimate_parameters
from retnet.stack.report import Severity, realism_report
from tests.paths import SHARED

CORPUS = SHARED / "eulerstack"


def catalogue(kind: str, scope: str | None = None) -> dict[str, dict]:
    index = CORPUS / f"{kind}.json"
    entries = json.loads(index.read_text()) if index.exists() else {}
    return {name: entry for name, entry in entries.items() if scope in (None, entry.get("scope"))}


def cases(kind: str, scope: str | None = None) -> list:
    """One test per file, or one skipped test if the corpus is not beside the repository."""
    found = catalogue(kind, scope)
    absent = pytest.param("", {}, marks=pytest.mark.skip(reason=f"no corpus at {CORPUS.name}/{kind}"))
    return [pytest.param(name, entry, id=name.removesuffix(".yml")) for name, entry in found.items()] or [absent]


def refused(kind: str, name: str) -> StackError:
    with pytest.raises(StackError) as caught:
        load_stack(CORPUS / kind / name)
    return caught.value


@pytest.mark.parametrize(("name", "entry"), cases("valid", "CORE"))
def test_a_core_file_has_its_layers_and_estimate(name, entry):
    stack = load_stack(CORPUS / "valid" / name)
    assert len(stack.layers) == entry["layers"]
    assert estimate_parameters(stack.spec, stack.layers) == entry["est_params"]


@pytest.mark.parametrize(("name", "entry"), cases("valid", "CORE"))
def test_the_report_on_a_core_file_agrees_with_eulerstack_on_shared_rules(name, entry):
    ours = [
        finding.rule
        for finding in realism_report(load_stack(CORPUS / "valid" / name))
        if finding.severity is Severity.WARNING and finding.rule not in ("unused_template", "window_without_length")
    ]
    assert ours == [finding["rule"] for finding in entry["report_findings"]]


# The unsupported features of each EXOTIC file: (path, name in the error).
EXOTIC_FEATURES = {
    "arch_advanced_mod_mini.yml": [("layer_schedule[1].depth_gating", "depth_gating")],
    "arch_expert_deepseek_moe_mini.yml": [],
    "arch_expert_dilated_longnet_mini.yml": [
        ("layer_templates.w32.mixer.attention", "window_mode: dilated"),
        ("layer_templates.w64.mixer.attention", "window_mode: dilated"),
        ("layer_templates.nsa.mixer.attention", "window_mode: nsa"),
    ],
    "arch_expert_dsv4_flash_mini.yml": [
        *((f"layer_templates.{name}.mixer.attention.compression", "compression") for name in ("csa", "hca")),
        ("layer_templates.csa.ffn.moe.routing", "type: hash"),
        ("compatibility.quant_aware_training", "quant_aware_training"),
    ],
    "head_mtp.yml": [],
    "integrator_ode_euler.yml": [("layer_schedule[1]", "integrator")],
    "integrator_ode_rk4.yml": [("layer_schedule[1]", "integrator")],
    "kitchen_sink.yml": [
        ("layer_templates.mla.memory", "memory"),
        ("layer_templates.ttt.mixer", "type: ttt_layer"),
        ("layer_schedule[1].depth_gating", "depth_gating"),
        ("layer_schedule[3]", "integrator"),
        ("layer_schedule[4]", "integrator"),
        ("transition", "transition"),
    ],
    "arch_expert_dual_stream_mini.yml": [],
    "parallel_add.yml": [],
    "parallel_default_merge.yml": [],
    "shape_change.yml": [("layer_templates.a.shape_change", "shape_change")],
}


@pytest.mark.parametrize(("name", "entry"), cases("valid", "EXOTIC"))
def test_an_exotic_file_is_refused_with_exactly_its_unsupported_features(name, entry):
    if not EXOTIC_FEATURES[name]:
        assert sum(len(layer.inner) for layer in load_stack(CORPUS / "valid" / name).layers) == entry["layers"]
        return
    error = refused("valid", name)
    assert {fault.category for fault in error.faults} == {Category.UNSUPPORTED}
    expected = EXOTIC_FEATURES[name]
    assert sorted(fault.dotted for fault in error.faults) == sorted(path for path, _ in expected)
    for path, key in expected:
        assert any(fault.dotted == path and f"`{key}`" in fault.what for fault in error.faults)


# Faults of features that are supported here: the only one, at its path, as in a CORE file.
SUPPORTED_FAULTS = {
    "residual_hyper_missing.yml",
    "branched_topk.yml",
    "parallel_bad_merge.yml",
    "parallel_nested.yml",
    "parallel_unknown_template.yml",
    "head_mtp_missing.yml",
    "head_mtp_n_predict_zero.yml",
    "head_mtp_on_causal_lm.yml",
    "attn_latent_too_big.yml",
    "modes_duplicate.yml",
    "modes_no_max_tokens.yml",
    "moe_affinity.yml",
    "moe_bias_enabled_int.yml",
}


@pytest.mark.parametrize(("name", "entry"), cases("invalid", "CORE"))
def test_a_core_fault_is_the_only_one_and_at_its_path(name, entry):
    [fault] = refused("invalid", name).faults
    assert fault.dotted in entry["path"].split("|")
    assert fault.category == entry["category"]


@pytest.mark.parametrize(("name", "entry"), cases("invalid", "EXOTIC"))
def test_an_exotic_fault_is_refused_at_a_prefix_of_its_path(name, entry):
    faults = refused("invalid", name).faults
    if name in SUPPORTED_FAULTS:
        assert [fault.dotted in entry["path"].split("|") for fault in faults] == [True]
        assert faults[0].category == entry["category"]
        return
    unsupported = [fault.dotted for fault in faults if fault.category is Category.UNSUPPORTED]
    assert any(
        f"{path}.".startswith((f"{prefix}.", f"{prefix}["))
        for prefix in unsupported
        for path in entry["path"].split("|")
    )
    assert len(unsupported) == len(faults)


# Files that EulerStack accepts or crashes on: the path and the start of the fix, or the reason why they are valid.
REFUSED_QUIRKS = {
    "cross_attn_merge_without_from_to.yml": ("layer_schedule[1].merge", "write from and to as two of"),
    "d_model_64_text.yml": ("model.d_model", "write 64, without quotes"),
    "dropout_2_0.yml": ("training_hints.dropout", "write a number in [0, 1)"),
    "dropout_text.yml": ("training_hints.dropout", "write a number in [0, 1)"),
    "enum_value_a_list.yml": (
        "layer_templates.retnet_layer.mixer.type",
        "write one of: attention, mamba, retnet, hyena",
    ),
    "expression_division_by_zero.yml": ("model.d_model", "divide by a number other than 0"),
    "ffn_bias_text.yml": ("layer_templates.retnet_layer.ffn.bias", "write true or false"),
    "head_tie_weights_text.yml": ("head.tie_weights", "write true or false"),
    "int_key_in_model.yml": ("model", "put it in quotes"),
    "mamba_d_conv_0.yml": ("layer_templates.mamba_layer.mixer.mamba.d_conv", "write 1"),
    "mamba_d_state_1.yml": ("layer_templates.mamba_layer.mixer.mamba.d_state", "write 1"),
    "mamba_expand_1_5.yml": ("layer_templates.mamba_layer.mixer.mamba.expand", "write 2"),
    "moe_capacity_factor_1_drop.yml": ("layer_templates.attn_layer.ffn.moe.capacity_factor", "write a number above 0"),
    "n_layers_etc_d_model_true_1_n_heads_1.yml": ("model.d_model", "write 1"),
    "repeat_on_a_parallel_entry.yml": ("layer_schedule[1].repeat", "write the entry several times"),
    "repeat_true.yml": ("layer_schedule[1].repeat", "write 1"),
    "retnet_chunk_size_abc.yml": ("layer_templates.retnet_layer.mixer.retnet.chunk_size", "write a positive integer"),
    "rope_scaling_text.yml": ("embedding.rope_scaling", "write a mapping"),
    "rope_scaling_unknown_type.yml": ("embedding.rope_scaling.type", "write one of: linear"),
    "schema_version_1_0.yml": ("schema_version", "write schema_version: 1"),
    "state_a_string.yml": ("layer_templates.retnet_layer.state", "write a mapping"),
    "tokenizer_pretrained_null.yml": ("tokenizer_contract.pretrained", "write text"),
    "transition_without_modes.yml": ("transition", "remove it"),
}
ACCEPTED_QUIRKS = {
    "compression_on_branched_sub_attention_null.yml": "settings that are null are the defaults; no branch is there",
    "expression_in_key_of_a_list_only.yml": "expressions are values of list items like any other",
    "override_window_null.yml": "null leaves the template's window, and this template has none to restore",
    "tok_vocab_mismatch.yml": "a vocabulary smaller than the tokenizer's may be meant; the report warns",
}


@pytest.mark.parametrize(("name", "entry"), cases("quirks"))
def test_a_quirk_is_refused_with_a_fix_or_accepted_for_a_reason(name, entry):
    assert (name in REFUSED_QUIRKS) != (name in ACCEPTED_QUIRKS)
    if name in ACCEPTED_QUIRKS:
        stack = load_stack(CORPUS / "quirks" / name)
        if name == "expression_in_key_of_a_list_only.yml":
            assert stack.spec.training_hints.betas == [0.9, 0.95]
        if name == "tok_vocab_mismatch.yml":
            assert "vocab_tokenizer_consistency" in [finding.rule for finding in realism_report(stack)]
        return
    [fault] = refused("quirks", name).faults
    path, fix = REFUSED_QUIRKS[name]
    assert fault.dotted == path
    assert fault.fix.startswith(fix)


@pytest.mark.skipif(not CORPUS.exists(), reason=f"no corpus at {CORPUS.name}")
def test_the_tables_name_only_files_of_the_corpus():
    assert {*REFUSED_QUIRKS, *ACCEPTED_QUIRKS} == set(catalogue("quirks"))
    assert set(EXOTIC_FEATURES) == set(catalogue("valid", "EXOTIC"))
