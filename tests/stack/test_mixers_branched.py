"""`type: branched`: its rules, what it is built as, and how it is described."""

import pytest

from retnet.layers.branched import BranchedConfig
from retnet.stack import Category
from retnet.stack.build import model_config
from retnet.stack.report import realism_report
from retnet.stack.summary import summarize

from .specs import FLOAT32, assert_decodes_as_it_reads, changed, faults, legend_of, only, stack

MIXER_A = "type: attention\n      attention: {window: 16}"
SSM, ATTN = "ssm: {type: mamba, mamba: {d_state: 8}}", "attn: {type: attention, attention: {window: 16}}"
HERE = "layer_templates.a.mixer.branched"


def branched(branches: str = f"{SSM}, {ATTN}", more: str = "") -> tuple[str, str]:
    return MIXER_A, f"type: branched\n      branched: {{branches: {{{branches}}}{more}}}"


def test_the_default_is_a_gate_over_all_branches():
    mixer = model_config(stack(branched())).layers[2].mixer
    assert isinstance(mixer, BranchedConfig)
    assert [branch.kind for branch in mixer.branches] == ["mamba2", "attention"]
    assert (mixer.merge, mixer.top_k, mixer.input_scales, mixer.output_scales) == ("gate", None, (), ())


def test_a_branched_stack_decodes_as_it_reads():
    more = ", vendor.retnet.merge: sum, vendor.retnet.output_scales: {ssm: 0.7}"
    assert_decodes_as_it_reads(model_config(stack(branched(more=more), FLOAT32)))


@pytest.mark.parametrize(
    ("branches", "more", "path", "what"),
    [
        (SSM, "", "branches", "expected at least two branches, got 1"),
        (f"{SSM}, b: {{type: branched}}", "", "branches.b", "a branch cannot be branched itself"),
        (f"{SSM}, b: {{type: atention}}", "", "branches.b.type", "unknown value 'atention'"),
        (f"{SSM}, b: {{type: attention, mamba: {{}}}}", "",
         "branches.b", "`mamba` cannot be given with type: attention"),
        (f"{SSM}, b: {{type: hyena, hyena: {{dept: 3}}}}", "", "branches.b.hyena", "unknown key 'dept'"),
        (f"{SSM}, b: {{type: retnet, retnet: {{vendor.retnet.conv_width: 9}}}}", "",
         "branches.b.retnet.vendor.retnet.conv_width", "expected 2 to 8 tokens, got 9"),
        (f"{SSM}, {ATTN}", ", selector: {top_k: 3}", "selector.top_k", "top_k 3 is more than the 2 branches"),
        (f"{SSM}, {ATTN}", ", selector: {type: gumbel}", "selector.type", "unknown value 'gumbel'"),
        (f"{SSM}, {ATTN}", ", selector: {input: embedding}", "selector.input", "unknown value 'embedding'"),
        (f"{SSM}, {ATTN}", ", selector: {}, vendor.retnet.merge: sum", "selector",
         "a selector is the gate of the branches, not of merge: sum"),
        (f"{SSM}, {ATTN}", ", vendor.retnet.output_scales: {atn: 0.5}", "vendor.retnet.output_scales.atn",
         "there is no branch 'atn'"),
        (f"{SSM}, {ATTN}", ", vendor.retnet.input_scales: {attn: 0}", "vendor.retnet.input_scales.attn",
         "expected a number above 0, got 0"),
    ],
)  # fmt: skip
def test_a_fault_is_named_at_its_place(branches, more, path, what):
    fault = only(changed(branched(branches, more)))
    assert (fault.dotted, fault.what, fault.category) == (f"{HERE}.{path}", what, Category.VALIDATION)


def test_an_unsupported_mixer_is_refused_inside_a_branch_too():
    fault = only(changed(branched(f"{SSM}, b: {{type: ttt_layer, ttt: {{}}}}")))
    assert (fault.dotted, fault.category) == (f"{HERE}.branches.b", Category.UNSUPPORTED)


def test_a_branched_layer_has_no_state_of_its_own_to_set():
    text = changed(branched(), ("ffn: {type: mlp}", "ffn: {type: mlp}\n    state: {kv_cache: true}"))
    assert [fault.category for fault in faults(text)] == [Category.COMPATIBILITY]


@pytest.mark.parametrize(
    ("branches", "decides", "reach"),
    [
        (f"{SSM}, {ATTN}", True, None),
        (f"{SSM}, b: {{type: attention}}", False, None),
        (f"r: {{type: retnet}}, {ATTN}", False, 5),
    ],
)
def test_reach_is_that_of_all_branches(branches, decides, reach):
    with_branches = stack(branched(branches))
    row = summarize(with_branches, model_config(with_branches))[2]
    assert row.layer.mixer.reach_depends_on_input is decides
    assert row.reach is None if reach is None else len(row.reach) == reach


def test_words_the_picture_and_the_report_name_the_branches():
    mixed = stack(branched(more=", selector: {type: top_k}"), ("max_seq_len: 256", "max_seq_len: 8192"))
    config = model_config(mixed)
    assert summarize(mixed, config)[2].mixer == "mamba2, state 8 + attention, window 16 (gate, 1 of 2)"
    assert "branched: mamba2 + attention" in legend_of(mixed, config)
    rules = {finding.rule: finding.message for finding in realism_report(mixed)}
    assert "seq_len_ratio" in rules
    assert rules["layer_count_info"] == "3 layers: 2 retnet, 1 branched"
