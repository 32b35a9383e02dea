"""The schema: accepted values, rules between keys, and error messages."""

import pytest

from retnet.stack import Category, StackError, parse_stack
from retnet.stack.errors import plain, show
from retnet.stack.section import RESERVED_PREFIXES

from .specs import BASE, changed, faults, only, stack


def in_retnet(options: str) -> tuple[str, str]:
    return "retnet: {chunk_size: 32}", f"retnet: {{{options}}}"


def in_mixer(mixer: str) -> tuple[str, str]:
    """Replace the attention mixer of the base."""
    return "      type: attention\n      attention: {window: 16}", f"      {mixer}"


def in_ffn(ffn: str) -> tuple[str, str]:
    return "ffn: {type: mlp}", f"ffn: {{{ffn}}}"


def test_an_error_has_three_lines_per_fault_in_the_order_of_the_file():
    text = changed(("d_model: 64", "d_model: '64'"), ("type: mlp", "typ: mlp"), ("- template: a", "- template: b"))
    with pytest.raises(StackError) as caught:
        parse_stack(text, "my.yml")
    assert caught.value.origin == "my.yml"
    assert str(caught.value).split("\n") == [
        "ValidationError: model.d_model: expected a positive integer, got '64' (text) (line 4, column 12)",
        "Fix: write 64, without quotes",
        "See: docs/reference/stack.md#model",
        "",
        "ValidationError: layer_templates.a.ffn: the key 'type' is missing (line 24, column 5)",
        "Fix: add `type`: mlp, gated_mlp, moe",
        "See: docs/reference/stack.md#ffn",
        "",
        "ValidationError: layer_templates.a.ffn: unknown key 'typ' (line 24, column 11)",
        "Fix: did you mean type? keys known here: type, activation, bias, moe",
        "See: docs/reference/stack.md#ffn",
        "",
        "ValidationError: layer_schedule[1]: there is no template 'b' (line 27, column 13)",
        "Fix: defined are: a, r",
        "See: docs/reference/stack.md#layer_schedule",
    ]


def test_names_in_the_file_cannot_break_the_three_lines():
    text = changed(("  a:\n", '  "\\n\\e[2J\\ud800' + "x" * 500 + '":\n'), ("template: a", 'template: "\\0\\n"'))
    text = text.replace("ffn: {type: mlp}", 'ffn: {"\\r\\nFix: none": 1}')
    for fault in faults(text):
        assert len(str(fault).splitlines()) == 3
        assert str(fault).replace("\n", "").isprintable()
        assert all(len(line) < 400 for line in str(fault).splitlines())


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "null"), (True, "true"), (1.5, "1.5"), ("a\nb", "'a\\nb'"), ([1], "a list"), ({}, "a mapping")],
)
def test_values_are_shown_as_yaml_spells_them(value, shown):
    assert show(value) == shown


def test_long_text_is_cut_in_messages():
    assert plain("x" * 200).endswith("...")


@pytest.mark.parametrize(
    ("key", "bad", "path"),
    [
        ("d_model", value, "model.d_model")
        for value in ("0", "-1", "64.0", "true", "'64'", "null", "[64]", "{a: 1}", "x")
    ]
    + [("vocab_size", "2147483648", "model.vocab_size"), ("max_seq_len", "''", "model.max_seq_len")],
)  # fmt: skip
def test_only_integers_are_integers(key, bad, path):
    number = {"d_model": 64, "vocab_size": 257, "max_seq_len": 256}[key]
    assert only(changed((f"{key}: {number}\n", f"{key}: {bad}\n"))).dotted == path


@pytest.mark.parametrize(
    ("written", "fix"),
    [("2.67", "write 3"), ("2.4", "write 2"), ("64.0", "write 64"), ("true", "write 1"), ("-3", "write 1"),
     ("'8'", "write 8, without quotes"), ("1e3", "write 1000, without quotes"),
     ("${let.d}x", "write a positive integer; an expression")],
)  # fmt: skip
def test_the_fix_for_an_integer_is_the_nearest_accepted_value(written, fix):
    assert only(changed(("  n_heads: 4", f"  n_heads: 4\n  mlp_ratio: {written}"))).fix.startswith(fix)


HINTS = {
    "init": (["normal_0.02", "normal_1", "normal_2e-3", "paper", "torchscale"],
             ["normal", "normal_", "normal_0", "normal_x", "normal_-1", "xavier", "1", "null"]),
    "dropout": (["0", "0.5", "0.999"], ["1", "1.0", "-0.1", "high", "null", "true"]),
    "checkpointing": (["true", "no"], ["1", "'true'", "null"]),
    "seed": (["0", "7"], ["-1", "1.5", "'7'", "null"]),
    "router_aux_loss_coef": (["0", "0.1"], ["-0.1", "'0.1'"]),
    "lr_peak": (["0.1", "3.0e-4"], ["0", "-1", "3e-4"]),
    "lr_floor_ratio": (["0", "1"], ["-0.1", "1.1"]),
    "betas": (["[0.9, 0.95]", "[0, 0]"], ["[0.9]", "[0.9, 0.95, 0.99]", "0.9", "[0.9, 1]", "[0.9, x]", "null", "[]"]),
    "weight_decay": (["0"], ["-1"]),
    "grad_clip": (["0", "1"], ["-1"]),
    "warmup_steps_ratio": (["0", "1"], ["2"]),
    "router_lr_multiplier": (["0", "2"], ["-1"]),
    "optimizer": (["adamw", "muon", "hybrid"], ["sgd", "[adamw]", "1"]),
}  # fmt: skip


@pytest.mark.parametrize("key", HINTS)
def test_training_hints_accept_only_their_range(key):
    accepted, refused = HINTS[key]
    for value in accepted:
        assert faults(changed(more=f"training_hints: {{{key}: {value}}}\n")) == []
    for value in refused:
        assert only(changed(more=f"training_hints: {{{key}: {value}}}\n")).dotted.startswith(f"training_hints.{key}")


def test_a_wrong_number_in_betas_is_reported_at_its_index_and_other_values_at_the_list():
    found = faults(changed(more="training_hints: {betas: [1.5, x]}\n"))
    assert [fault.dotted for fault in found] == ["training_hints.betas[0]", "training_hints.betas"]


def test_a_too_large_number_is_refused_with_the_largest():
    assert stack(more="training_hints: {seed: 20240101123}\n").spec.training_hints.seed == 20240101123
    fault = only(changed(("d_model: 64", "d_model: 4294967296")))
    assert "an integer of at most 2147483647" in fault.what


@pytest.mark.parametrize("section", ["norm", "residual", "state"])
def test_optional_sections_of_a_template_are_mappings_or_null(section):
    ffn = "    ffn: {type: mlp}"
    assert faults(changed((ffn, f"{ffn}\n    {section}: null"))) == []
    assert only(changed((ffn, f"{ffn}\n    {section}: text"))).dotted == f"layer_templates.a.{section}"


def test_optional_sections_may_be_null_and_required_ones_may_not():
    assert (
        faults(changed(more="training_hints: null\ncompatibility: null\nexecution_modes: null\ntransition: null\n"))
        == []
    )
    assert only(changed(("head:\n  type: causal_lm\n", "head: null\n"))).dotted == "head"
    assert only(changed(("  type: causal_lm", "  type: null"))).dotted == "head.type"
    assert only(changed(("  n_heads: 4", "  n_heads: 4\n  n_kv_heads: null"))).dotted == "model.n_kv_heads"


@pytest.mark.parametrize("prefix", RESERVED_PREFIXES)
def test_reserved_keys_are_reported_and_refused_only_in_let(prefix):
    text = changed(("  type: hf", f"  type: hf\n  {prefix}x: {{any: [thing]}}"), more=f"{prefix}y: 1\n")
    assert [key.path[-1] for key in parse_stack(text).reserved] == [f"{prefix}x", f"{prefix}y"]
    assert only(changed(more=f"{prefix[:-1]}: 1\n")).dotted == "root"
    assert only(changed(more=f"let: {{{prefix}x: 1}}\n")).dotted == "let"
    assert only(changed(("type: hf", f"type: {prefix}hf"))).dotted == "tokenizer_contract.type"


def test_a_template_may_have_any_name():
    text = changed(("  a:\n", "  vendor.x:\n"), ("template: a", "template: vendor.x"))
    assert parse_stack(text).layers[-1].template == "vendor.x"


OURS = [
    ("key_dim: 32", None), ("key_dim: 30", "key_dim"), ("key_dim: 20", "key_dim"), ("key_dim: null", "key_dim"),
    ("value_dim: 96", None), ("value_dim: 97", "value_dim"), ("value_dim: 0", "value_dim"),
    ("decay: experiment", None), ("decay: gated", None), ("decay: none", None), ("decay: 0.9", None),
    ("decay: [0.5, 0.6, 0.7, 0.8]", None), ("decay: [0.5]", "decay"), ("decay: [0.1, x, 1, 1]", "decay"),
    ("decay: 1.5", "decay"), ("decay: papers", "decay"), ("decay: []", "decay"), ("decay: true", "decay"),
    ("decay: null", "decay"), ("learnable_decay: true", None), ("learnable_decay: 1", "learnable_decay"),
    ("decay: gated, vendor.retnet.learnable_decay: true", "learnable_decay"),
    ("decay: [0, 0.5, 0.5, 0.5], vendor.retnet.learnable_decay: true", "learnable_decay"),
    ("decay: gated, vendor.retnet.decay_norm: true", "decay_norm"), ("decay_norm: true", None),
    ("decay: alibi, vendor.retnet.decay_scale: 0.5", None), ("decay_scale: 0", "decay_scale"),
    ("decay: gated, vendor.retnet.decay_scale: 0.5", None), ("qkv_activation: silu", None),
    ("qkv_activation: silu, vendor.retnet.conv_width: 4", "qkv_activation"), ("head_norm_groups: 2", None),
    ("head_norm_groups: 3", "head_norm_groups"),
    ("conv_width: 4", None), ("conv_width: 1", "conv_width"), ("conv_width: 9", "conv_width"),
    ("conv_width: 4.0", "conv_width"), ("conv_on: qv", None), ("conv_on: vq", "conv_on"),
    ("conv_on: [q, v]", "conv_on"),
    ("conv_activation: none", None), ("conv_activation: gelu", "conv_activation"), ("gate: sigmoid", None),
    ("qk_norm: l2", None), ("qk_norm: layer", "qk_norm"), ("decay: gated, vendor.retnet.gated_start: paper", None),
    ("gated_start: paper", "gated_start"), ("gated_start: alibi", "gated_start"),
    ("rotary_dim: 8", None), ("rotary_dim: 7", "rotary_dim"), ("rotary_dim: 18", "rotary_dim"),
    ("key_dim: 36, vendor.retnet.rotary_dim: 4", None), ("key_dim: 8, vendor.retnet.rotary_dim: 4", "rotary_dim"),
    ("rotary: half", None), ("rotary: neox", "rotary"), ("gate: none", None), ("gate: gelu", "gate"),
    ("head_norm: rms", None), ("head_norm: group", "head_norm"),
    ("head_norm_affine: per_head", None), ("head_norm_affine: true", "head_norm_affine"),
    ("head_norm_eps: 1.0e-5", None), ("head_norm_eps: 0", "head_norm_eps"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "fault"), OURS)
def test_vendor_options_of_retention_are_validated(option, fault):
    found = faults(changed(in_retnet(f"vendor.retnet.{option}")))
    assert [fault.path[-1] for fault in found] == ([] if fault is None else [f"vendor.retnet.{fault}"])


OF_ATTENTION = [
    ("vendor.retnet.rotary_dim: 16", None), ("vendor.retnet.rotary_dim: 17", "vendor.retnet.rotary_dim"),
    ("vendor.retnet.rotary_dim: 18", "vendor.retnet.rotary_dim"),
    ("latent_dim: 16", None), ("latent_dim: null", None), ("latent_dim: 0", "latent_dim"),
    ("latent_dim: 64", "latent_dim"), ("latent_dim: 16, vendor.retnet.rope: true", None),
    ("latent_dim: 16, vendor.retnet.mla.rope_dim: 8", None),
    ("latent_dim: 16, vendor.retnet.mla.rope_dim: 7", "vendor.retnet.mla.rope_dim"),
    ("vendor.retnet.mla.rope_dim: 8", "vendor.retnet.mla.rope_dim"),
    ("vendor.retnet.mla.q_rank: 8", "vendor.retnet.mla.q_rank"),
    ("vendor.retnet.mla.norm: rms", "vendor.retnet.mla.norm"),
    ("latent_dim: 16, vendor.retnet.mla.norm: layer", "vendor.retnet.mla.norm"),
    ("latent_dim: 16, vendor.retnet.rope: false, vendor.retnet.mla.rope_dim: 8", "vendor.retnet.mla.rope_dim"),
    ("latent_dim: 16, vendor.retnet.rotary_dim: 8", "vendor.retnet.rotary_dim"),
    ("latent_dim: 16, vendor.retnet.rope: true, vendor.retnet.rotary_dim: 8", None),
    ("latent_dim: 16, vendor.retnet.mla.rope_dim: 4, vendor.retnet.rotary_dim: 8", "vendor.retnet.rotary_dim"),
    ("attention_sinks: {n_per_head: 0}", None), ("attention_sinks: {n_per_head: -1}", "n_per_head"),
    ("attention_sinks: {learnable: 1}", "learnable"), ("attention_sinks: null", "attention_sinks"),
    ("attention_sinks: 4", "attention_sinks"), ("attention_sinks: {heads: 4}", "attention_sinks"),
    ("vendor.retnet.rope: false, vendor.retnet.rotary_dim: 8", "vendor.retnet.rotary_dim"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "fault"), OF_ATTENTION)
def test_options_of_attention_are_validated(option, fault):
    found = faults(changed(in_mixer(f"{{type: attention, attention: {{{option}}}}}")))
    assert [fault.path[-1] for fault in found] == ([] if fault is None else [fault])


@pytest.mark.parametrize(
    ("word", "key"),
    [("gamma", "decay"), ("decay", "decay"), ("vendor.retnet.gamma", "decay"), ("conv_width", "conv_width")],
)
def test_a_word_for_a_key_of_ours_is_answered_with_the_key(word, key):
    fault = only(changed(("{chunk_size: 32}", f"{{{word}: 0.9}}")))
    assert fault.what == f"unknown key '{word}'"
    assert fault.fix.startswith(f"did you mean vendor.retnet.{key}? ")


@pytest.mark.parametrize(
    "word", ["vendor.retnet.mla", "rope_dim", "vendor.retnet.rope_dim", "vendor.retnet.mla.ropedim"]
)
def test_a_word_for_the_width_of_decoupled_rotary_is_answered_with_the_key(word):
    fault = only(changed(in_mixer(f"{{type: attention, attention: {{latent_dim: 16, {word}: 8}}}}")))
    assert fault.fix.startswith("did you mean vendor.retnet.mla.rope_dim? ")


def test_unknown_keys_with_our_vendor_prefix_are_refused():
    fault = only(changed(in_retnet("vendor.retnet.value_dims: 128")))
    assert fault.dotted == "layer_templates.r.mixer.retnet"
    assert "did you mean vendor.retnet.value_dim?" in fault.fix
    assert only(changed(("  type: hf", "  type: hf\n  vendor.retnet.gate: none"))).dotted == "tokenizer_contract"


@pytest.mark.parametrize(
    ("pairs", "path"),
    [
        ([("n_heads: 4", "n_heads: 5")], "model.d_model"),
        ([("n_heads: 4", "n_heads: 4\n  n_kv_heads: 3")], "model.n_heads"),
        ([("n_heads: 4", "n_heads: 64")], "model.d_model"),
        ([("vocab_size: 257", "vocab_size: 256")], "model.vocab_size"),
        ([("positional: rope", "positional: none")], "layer_templates.r.mixer.retnet.rope"),
        ([("positional: rope", "positional: alibi\n  rope_theta: 1000.0"), in_retnet("rope: false")],
         "embedding.rope_theta"),
        ([("positional: rope", "positional: none\n  rope_scaling: {factor: 2.0}"), in_retnet("rope: false")],
         "embedding.rope_scaling"),
        ([("positional: rope", "positional: rope\n  rope_theta: -1")], "embedding.rope_theta"),
        ([("positional: rope", "positional: rope\n  rope_theta: 1\n  rope_scaling: {type: yarn}")],
         "embedding.rope_theta"),
        ([("positional: rope", "positional: rope\n  rope_scaling: {factor: 0}")], "embedding.rope_scaling.factor"),
        ([("positional: rope", "positional: rope\n  tie_word_embeddings: true"),
          ("type: causal_lm", "type: causal_lm\n  tie_weights: false")], "head.tie_weights"),
        ([in_mixer("type: attention\n      mamba: {}")], "layer_templates.a.mixer"),
        ([in_mixer("type: attention\n      branched: {}")], "layer_templates.a.mixer"),
        ([in_mixer("type: mamba\n      mamba: {vendor.retnet.head_dim: 48}")],
         "layer_templates.a.mixer.mamba.vendor.retnet.head_dim"),
        ([in_mixer("type: mamba\n      mamba: {variant: mamba1, vendor.retnet.head_dim: 32}")],
         "layer_templates.a.mixer.mamba.vendor.retnet.head_dim"),
        ([in_ffn("type: mlp, activation: swiglu")], "layer_templates.a.ffn.activation"),
        ([in_ffn("type: moe")], "layer_templates.a.ffn"),
        ([in_ffn("type: moe, moe: {experts: 2, top_k: 3}")], "layer_templates.a"),
        ([in_ffn("type: mlp, moe: {experts: 2, top_k: 1}")], "layer_templates.a.ffn"),
        ([in_ffn("type: mlp, activation: null")], "layer_templates.a.ffn.activation"),
        ([in_ffn("type: mlp}\n    norm: {position: post}\n    residual: {type: parallel")],
         "layer_templates.a.norm.position"),
        ([("template: a", "template: a\n  override: {attention: {window: null}}")],
         "layer_schedule[1].override.attention.window"),
        ([("template: r, repeat: 2", "template: r, override: {attention: {window: 8}}")],
         "layer_schedule[0].override.attention"),
        ([("template: a", "template: a\n  override: {ffn: {activation: swiglu}}")],
         "layer_schedule[1].override.ffn.activation"),
        ([("template: a", "template: a\n  override: {mixer: {}}")], "layer_schedule[1].override"),
        ([("template: a", "template: a\n  override: 3")], "layer_schedule[1].override"),
        ([("template: a", "template: [a]")], "layer_schedule[1]"),
        ([("template: a", "template: 7")], "layer_schedule[1]"),
        ([("repeat: 2", "repeat: 2000000000")], "layer_schedule[0].repeat"),
    ],
)  # fmt: skip
def test_a_clash_is_reported_at_the_value_to_change(pairs, path):
    fault = only(changed(*pairs))
    assert fault.dotted == path
    assert fault.category is Category.VALIDATION


def test_a_fault_in_one_template_does_not_hide_another():
    text = changed(in_retnet("gamma: 0.9"), in_ffn("type: mlp, activation: swiglu"), ("n_heads: 4", "n_heads: 5"))
    assert {fault.dotted for fault in faults(text)} == {
        "layer_templates.r.mixer.retnet", "layer_templates.a.ffn.activation", "model.d_model",
    }  # fmt: skip


@pytest.mark.parametrize("value", ["true", "'false'", "1", "[0]"])
@pytest.mark.parametrize(
    ("mixer", "state", "fault"),
    [("attention", "kv_cache", False), ("attention", "ssm_state", True), ("mamba", "ssm_state", False),
     ("mamba", "kv_cache", True), ("hyena", "kv_cache", True), ("hyena", "ssm_state", True)],
)  # fmt: skip
def test_a_mixer_accepts_only_its_own_state_key(mixer, state, fault, value):
    """Any other key is refused, whatever its value."""
    text = changed(in_mixer(f"type: {mixer}"), in_ffn(f"type: mlp}}\n    state: {{{state}: {value}"))
    found = [(fault.category, fault.dotted) for fault in faults(text)]
    if fault:
        assert found == [(Category.COMPATIBILITY, "layer_templates.a")]
    else:
        own = [] if value == "true" else [(Category.VALIDATION, f"layer_templates.a.state.{state}")]
        assert found == own


@pytest.mark.parametrize(
    ("mixer", "state", "fault"),
    [("ttt_layer", "kv_cache", True), ("ttt_layer", "ssm_state", False)],
)
def test_the_state_key_of_an_unsupported_mixer_is_checked_too(mixer, state, fault):
    text = changed(in_mixer(f"type: {mixer}"), in_ffn(f"type: mlp}}\n    state: {{{state}: true"))
    found = [(fault.category, fault.dotted) for fault in faults(text)]
    assert (Category.UNSUPPORTED, "layer_templates.a.mixer") in found
    assert ((Category.COMPATIBILITY, "layer_templates.a") in found) is fault


@pytest.mark.parametrize(
    ("pairs", "more", "path"),
    [
        ([("{window: 16}", "{window: 16, compression: null}")], "", "layer_templates.a.mixer.attention.compression"),
        ([("{window: 16}", "{window: 16, attention_sinks: null}")], "",
         "layer_templates.a.mixer.attention.attention_sinks"),
        *(([in_ffn(f"type: moe, moe: {{experts: 4, top_k: 2, {key}: null}}")], "", f"layer_templates.a.ffn.moe.{key}")
          for key in ("bias_correction", "affinity", "shared_experts", "routing", "balance", "router_init_std")),
        *(([], f"training_hints: {{{key}: null}}\n", f"training_hints.{key}") for key in ("optimizer_groups", "muon")),
        ([], "compatibility: {quant_aware_training: null}\n", "compatibility.quant_aware_training"),
    ],
)  # fmt: skip
def test_null_is_refused_where_the_schema_does_not_allow_it(pairs, more, path):
    assert only(changed(*pairs, more=more)).dotted == path


@pytest.mark.parametrize(
    ("pairs", "more", "path"),
    [
        ([in_ffn('type: moe, moe: "${nope}"')], "", "layer_templates.a.ffn.moe"),
        ([("template: a", 'template: a\n  override: {attention: {window: "${1//0}"}}')], "",
         "layer_schedule[1].override.attention.window"),
        ([("d_model: 64", 'd_model: "${let.d}"')], "let: .inf\n", "let"),
        ([("d_model: 64", 'd_model: "${let.d}"')], "let: null\n", "let"),
        ([("d_model: 64", 'd_model: "${let.d}"')], "let: {d: null}\n", "let.d"),
    ],
)  # fmt: skip
def test_the_consequences_of_a_fault_are_not_reported(pairs, more, path):
    assert only(changed(*pairs, more=more)).dotted == path


@pytest.mark.parametrize(
    ("head", "path", "fix"),
    [
        ("causal_lm_mtp", "head.mtp", "add mtp: {head_template: NAME}"),
        ("causal_lm_mtp\n  mtp: null", "head.mtp", "add mtp: {head_template: NAME}"),
        ("causal_lm\n  mtp: null", "head.mtp", "remove it, or write type: causal_lm_mtp"),
        ("causal_lm_mtp\n  mtp: {head_template: b}", "head.mtp.head_template", "defined are: a, r"),
        ("causal_lm_mtp\n  mtp: {head_template: a, n_predict: 65}", "head.mtp.n_predict", "write 64"),
        ("causal_lm_mtp\n  mtp: {head_template: a, head_layers: 0}", "head.mtp.head_layers", "write 1"),
        ("causal_lm_mtp\n  mtp: {head_template: a, train_loss_weight: -1}", "head.mtp.train_loss_weight", "write"),
        ("causal_lm_mtp\n  mtp: {n_predict: 2}", "head.mtp", "add `head_template`"),
    ],
)
def test_multi_token_prediction_is_given_with_its_type_and_a_template(head, path, fix):
    fault = only(changed(("type: causal_lm", f"type: {head}")))
    assert fault.dotted == path
    assert fault.fix.startswith(fix)


def test_a_template_named_by_a_number_is_one_fault():
    text = (
        BASE[: BASE.index("  r:\n")]
        + "  7:\n"
        + BASE[BASE.index("  a:\n") + len("  a:\n") : BASE.index("- {template: r")]
    )
    found = faults(text + "- template: '7'\nhead:\n  type: causal_lm\n")
    assert [fault.dotted for fault in found] == ["layer_templates"]
    assert "the key '7' is not text" in found[0].what


def test_let_is_suggested_for_a_similar_section():
    assert only(changed(more="lets: {d: 1}\n")).fix.startswith("did you mean let?")


def test_missing_keys_are_reported_at_their_mapping_with_accepted_values():
    fault = only(BASE.replace("  positional: rope\n", ""))
    assert (fault.dotted, fault.mark.line) == ("embedding", 11)
    assert fault.fix == "add `positional`: rope, none, alibi"
    assert [fault.dotted for fault in faults("{}")] == ["root"] * 7


@pytest.mark.parametrize(
    ("pairs", "path"),
    [
        ([("{window: 16}", "{window: 16, window_dilation: 2}")], "layer_templates.a.mixer.attention.window_dilation"),
        ([("{window: 16}", "{window: 16, window_mode: dilated, window_dilation: 2}")],
         "layer_templates.a.mixer.attention"),
        ([("{window: 16}", "{compression: {type: hca}}")], "layer_templates.a.mixer.attention.compression"),
        ([in_mixer("type: ttt_layer")], "layer_templates.a.mixer"),
        ([("template: a", "template: a\n  merge: {type: add}")], "layer_schedule[1].merge"),
        ([("template: a", "integrator: {type: discrete, steps: 2, body: a}")], "layer_schedule[1]"),
    ],
)  # fmt: skip
def test_an_unsupported_feature_is_refused_once_at_its_place(pairs, path):
    fault = only(changed(*pairs))
    assert (fault.category, fault.dotted) == (Category.UNSUPPORTED, path)
    assert "is not supported here" in fault.what
    assert fault.see == "docs/reference/stack.md#not-supported"


def test_null_is_accepted_for_unsupported_keys_where_the_schema_allows_it():
    pairs = [("{window: 16}", "{window: 16, latent_dim: null}"), ("template: a", "template: a\n  depth_gating: null")]
    assert faults(changed(*pairs, in_ffn("type: mlp}\n    memory: null\n    norm: {"))) == []
