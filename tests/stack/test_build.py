"""The model configuration of a stack: every key reaches its field."""

from typing import Any

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.stack import parse_stack
from retnet.stack.build import model_config
from retnet.stack.hyper_connections import HyperConnections
from retnet.stack.report import realism_report
from retnet.stack.schema import ExecutionMode, MuonHints, OptimizerGroups
from tests.small_models import unit_gain_

from .specs import changed, faults, only, stack
from .test_stack_guide import sections

FFN = "ffn: {type: mlp}"
RETNET = "retnet: {chunk_size: 32}"
ATTENTION = "attention: {window: 16}"
MIXER_A = "type: attention\n      attention: {window: 16}"


def built(*pairs: tuple[str, str], more: str = "") -> ModelConfig:
    return model_config(stack(*pairs, more=more))


def test_the_base_stack_has_retention_and_grouped_query_attention():
    config = built(("n_heads: 4", "n_heads: 4\n  n_kv_heads: 2"))
    retention, _, attention = config.layers
    assert retention.mixer == RetentionConfig(4, key_dim=64, value_dim=128, mode="chunkwise", chunk_size=32)
    assert attention.mixer == AttentionConfig(4, num_kv_heads=2, head_dim=16, window=16)
    assert retention.feed_forward == FeedForwardConfig(256, gated=True, activation="swish")
    assert attention.feed_forward == FeedForwardConfig(256, gated=False, activation="gelu")
    assert (config.final_norm, config.dtype, config.bos_token_id) == ("rms", "bfloat16", 256)
    assert (config.init, config.init_std, config.seed, config.tie_embeddings) == ("normal", 0.02, 1234, True)


def heads(line: str) -> tuple[str, str]:
    return "n_heads: 4", f"n_heads: 4\n  {line}"


def positional(line: str) -> tuple[str, str]:
    return "positional: rope", f"positional: rope\n  {line}"


def template_a(line: str) -> tuple[str, str]:
    return FFN, f"{FFN}\n    {line}"


def head(line: str) -> tuple[str, str]:
    return "type: causal_lm", f"type: causal_lm\n  {line}"


def multi_token(option: str) -> tuple[str, str]:
    return "type: causal_lm", f"type: causal_lm_mtp\n  mtp: {{head_template: a, {option}}}"


def mup(options: str) -> tuple[str, str]:
    return "layer_templates:", f"training_hints:\n  vendor.retnet.mup: {{{options}}}\nlayer_templates:"


def mamba(options: str) -> tuple[str, str]:
    return MIXER_A, f"type: mamba\n      mamba: {{{options}}}"


def hyena(options: str) -> tuple[str, str]:
    return MIXER_A, f"type: hyena\n      hyena: {{{options}}}"


def parallel(merge: str) -> tuple[str, str]:
    streams = "{stream: x, body: [{template: r, repeat: 2}]}, {stream: y, body: [{template: a}]}"
    return "- template: a", f"- parallel: [{streams}]\n  merge: {{{merge}}}"


def branched(options: str) -> tuple[str, str]:
    return (
        MIXER_A,
        f"type: branched\n      branched: {{branches: {{m: {{type: mamba}}, a: {{type: attention}}}}, {options}}}",
    )


def moe(option: str, experts: int = 4, top_k: int = 2) -> tuple[str, str]:
    return FFN, f"ffn: {{type: moe, moe: {{experts: {experts}, top_k: {top_k}, {option}}}}}"


YARN = positional("rope_scaling: {type: yarn, factor: 4.0}")
# For every key that describes the model: (section, key) -> (changes to the base stack, the field, its value).
CHANGES = {
    ("Model", "name"): ([("name: base", "name: other")], "name", "other"),
    ("Model", "d_model"): ([("d_model: 64", "d_model: 32")], "d_model", 32),
    ("Model", "vocab_size"): ([("vocab_size: 257", "vocab_size: 300")], "vocab_size", 300),
    ("Model", "n_heads"): ([("n_heads: 4", "n_heads: 2")], "layers.0.mixer.num_heads", 2),
    ("Model", "n_kv_heads"): ([heads("n_kv_heads: 1")], "layers.2.mixer.num_kv_heads", 1),
    ("Model", "mlp_ratio"): ([heads("mlp_ratio: 3")], "layers.0.feed_forward.hidden_dim", 192),
    ("Model", "dtype"): ([heads("dtype: float16")], "dtype", "float16"),
    ("Model", "max_seq_len"): (
        [YARN, ("max_seq_len: 256", "max_seq_len: 512")], "layers.2.mixer.rotary_yarn_length", 128),
    ("TokenizerContract", "pretrained"): ([("pretrained: bytes", "pretrained: x")], "bos_token_id", None),
    ("Embedding", "positional"): (
        [("positional: rope", "positional: alibi"), (RETNET, "retnet: {rope: false}")], "layers.2.mixer.alibi", True),
    ("Embedding", "rope_theta"): ([positional("rope_theta: 500.0")], "layers.2.mixer.rotary_base", 500.0),
    ("Embedding", "rope_scaling"): ([positional("rope_scaling: {factor: 2.0}")], "layers.0.mixer.rotary_factor", 2.0),
    ("Embedding", "tie_word_embeddings"): ([positional("tie_word_embeddings: false")], "tie_embeddings", False),
    ("Embedding", "scale"): ([positional("scale: 8.0")], "embedding_scale", 8.0),
    ("RopeScaling", "type"): ([YARN], "layers.0.mixer.rotary_yarn_length", 64),
    ("RopeScaling", "factor"): ([positional("rope_scaling: {factor: 3.0}")], "layers.2.mixer.rotary_factor", 3.0),
    ("Attention", "qkv_bias"): ([(ATTENTION, "attention: {qkv_bias: true}")], "layers.2.mixer.qkv_bias", True),
    ("Attention", "attn_drop"): ([(ATTENTION, "attention: {attn_drop: 0.3}")], "layers.2.mixer.dropout", 0.3),
    ("Attention", "window"): ([(ATTENTION, "attention: {window: 8}")], "layers.2.mixer.window", 8),
    ("Attention", "attention_sinks"): (
        [(ATTENTION, "attention: {attention_sinks: {}}")], "layers.2.mixer.num_sinks", 1),
    ("AttentionSinks", "n_per_head"): (
        [(ATTENTION, "attention: {attention_sinks: {n_per_head: 2}}")], "layers.2.mixer.num_sinks", 2),
    ("AttentionSinks", "learnable"): (
        [(ATTENTION, "attention: {attention_sinks: {learnable: false}}")], "layers.2.mixer.learnable_sinks", False),
    ("Attention", "latent_dim"): ([(ATTENTION, "attention: {latent_dim: 16}")], "layers.2.mixer.latent_dim", 16),
    ("Attention", "vendor.retnet.mla.rope_dim"): (
        [(ATTENTION, "attention: {latent_dim: 16, vendor.retnet.mla.rope_dim: 8}")], "layers.2.mixer.rope_dim", 8),
    ("Attention", "vendor.retnet.mla.q_rank"): (
        [(ATTENTION, "attention: {latent_dim: 16, vendor.retnet.mla.q_rank: 24}")], "layers.2.mixer.q_rank", 24),
    ("Attention", "vendor.retnet.mla.norm"): (
        [(ATTENTION, "attention: {latent_dim: 16, vendor.retnet.mla.norm: rms}")], "layers.2.mixer.latent_norm", "rms"),
    ("Attention", "vendor.retnet.rope"): (
        [(ATTENTION, "attention: {vendor.retnet.rope: false}")], "layers.2.mixer.rotary", "none"),
    ("Attention", "vendor.retnet.rotary_dim"): (
        [(ATTENTION, "attention: {vendor.retnet.rotary_dim: 8}")], "layers.2.mixer.rotary_dim", 8),
    ("Retnet", "vendor.retnet.rotary_dim"): (
        [(RETNET, "retnet: {vendor.retnet.rotary_dim: 8}")], "layers.0.mixer.rotary_dim", 8),
    ("Attention", "vendor.retnet.qk_norm"): (
        [(ATTENTION, "attention: {vendor.retnet.qk_norm: rms}")], "layers.2.mixer.qk_norm", "rms"),
    ("Attention", "vendor.retnet.gate"): (
        [(ATTENTION, "attention: {vendor.retnet.gate: sigmoid}")], "layers.2.mixer.gate", "sigmoid"),
    ("Retnet", "vendor.retnet.gated_start"): (
        [(RETNET, "retnet: {vendor.retnet.decay: gated, vendor.retnet.gated_start: paper}")],
        "layers.0.mixer.gated_start", "paper"),
    ("Retnet", "vendor.retnet.conv_on"): (
        [(RETNET, "retnet: {vendor.retnet.conv_width: 4, vendor.retnet.conv_on: qv}")],
        "layers.0.mixer.conv_on", ("q", "v")),
    ("Retnet", "chunkwise"): ([(RETNET, "retnet: {chunkwise: false}")], "layers.0.mixer.mode", "parallel"),
    ("Retnet", "chunk_size"): ([(RETNET, "retnet: {chunk_size: 16}")], "layers.0.mixer.chunk_size", 16),
    ("Retnet", "rope"): ([(RETNET, "retnet: {rope: false}")], "layers.0.mixer.rotary", "none"),
    ("Mamba", "variant"): ([mamba("variant: mamba1")], "layers.2.mixer.kind", "mamba1"),
    ("Mamba", "d_state"): ([mamba("d_state: 8")], "layers.2.mixer.state_dim", 8),
    ("Mamba", "d_conv"): ([mamba("d_conv: 3")], "layers.2.mixer.conv_width", 3),
    ("Mamba", "expand"): ([mamba("expand: 3")], "layers.2.mixer.inner_dim", 192),
    ("Mamba", "vendor.retnet.head_dim"): ([mamba("vendor.retnet.head_dim: 8")], "layers.2.mixer.head_dim", 8),
    ("State", "ssm_state"): (
        [mamba("d_conv: 4"), template_a("state: {ssm_state: false}")], "layers.2.keeps_state", False),
    ("Hyena", "depth"): ([hyena("depth: 3")], "layers.2.mixer.order", 3),
    ("Hyena", "filter_hidden"): ([hyena("filter_hidden: 8")], "layers.2.mixer.filter_hidden", 8),
    ("Hyena", "filter_decay"): ([hyena("filter_decay: 0.1")], "layers.2.mixer.filter_decay", 0.1),
    ("Ffn", "moe"): ([moe("router: softmax")], "layers.2.feed_forward.kind", "moe"),
    ("Moe", "experts"): ([moe("router: softmax", experts=5)], "layers.2.feed_forward.num_experts", 5),
    ("Moe", "top_k"): ([moe("router: softmax", top_k=3)], "layers.2.feed_forward.top_k", 3),
    ("Moe", "router"): ([moe("router: sigmoid")], "layers.2.feed_forward.router", "sigmoid"),
    ("Moe", "z_loss"): ([moe("z_loss: 0.1")], "layers.2.feed_forward.z_loss_coef", 0.1),
    ("Moe", "capacity_factor"): ([moe("capacity_factor: 1.5")], "layers.2.feed_forward.capacity_factor", 1.5),
    ("Moe", "load_balance_coef"): ([moe("load_balance_coef: 0")], "layers.2.feed_forward.load_balance_coef", 0.0),
    ("Moe", "router_init_std"): ([moe("router_init_std: 0.3")], "layers.2.feed_forward.router_init_std", 0.3),
    ("Moe", "router_jitter"): ([moe("router_jitter: 0.2")], "layers.2.feed_forward.router_jitter", 0.2),
    ("Moe", "capacity_drop_policy"): (
        [moe("capacity_drop_policy: pad")], "layers.2.feed_forward.capacity_policy", "pad"),
    ("ParallelEntry", "parallel"): ([parallel("type: add")], "layers.2.mixer.kind", "streams"),
    ("ParallelEntry", "merge"): ([parallel("type: add")], "layers.2.mixer.merge", "add"),
    ("Merge", "type"): ([parallel("type: gated")], "layers.2.mixer.merge", "gate"),
    ("Merge", "from"): ([parallel("type: cross_attn, from: y, to: x")], "layers.2.mixer.cross_streams", (0, 1)),
    ("Merge", "to"): ([parallel("type: cross_attn, from: x, to: y")], "layers.2.mixer.cross_streams", (1, 0)),
    ("Merge", "projection"): ([parallel("projection: true")], "layers.2.mixer.merge", "concat"),
    ("Stream", "stream"): ([parallel("type: add")], "layers.2.skip_scale", 0.0),
    ("Stream", "body"): ([parallel("type: add")], "layers.2.mixer.depth", 2),
    ("BodyEntry", "template"): ([parallel("type: add")], "layers.2.mixer.leaves.0.kind", "retention"),
    ("BodyEntry", "repeat"): ([parallel("type: add")], "layers.2.mixer.depth", 2),
    ("Moe", "affinity"): ([moe("affinity: sqrt_softplus")], "layers.2.feed_forward.router", "sqrt_softplus"),
    ("Moe", "shared_experts"): ([moe("shared_experts: 2")], "layers.2.feed_forward.shared_hidden_dim", 512),
    ("Moe", "bias_correction"): (
        [moe("bias_correction: {enabled: true}")], "layers.2.feed_forward.bias_update_rate", 1e-3),
    ("BiasCorrection", "enabled"): (
        [moe("bias_correction: {enabled: true}")], "layers.2.feed_forward.bias_update_rate", 1e-3),
    ("BiasCorrection", "update_rate"): (
        [moe("bias_correction: {enabled: true, update_rate: 0.01}")], "layers.2.feed_forward.bias_update_rate", 0.01),
    ("BiasCorrection", "target_imbalance"): (
        [moe("bias_correction: {target_imbalance: 0.2}")], "layers.2.feed_forward.bias_tolerance", 0.2),
    ("Moe", "balance"): ([moe("balance: {group_limit: 1}")], "layers.2.feed_forward.top_groups", 1),
    ("Balance", "sequence_aux_coef"): (
        [moe("balance: {sequence_aux_coef: 0.1}")], "layers.2.feed_forward.sequence_balance_coef", 0.1),
    ("Balance", "group_limit"): ([moe("balance: {group_limit: 3}")], "layers.2.feed_forward.top_groups", 3),
    ("Moe", "vendor.retnet.groups"): (
        [moe("balance: {group_limit: 1}, vendor.retnet.groups: 2")], "layers.2.feed_forward.num_groups", 2),
    ("Moe", "vendor.retnet.routed_scale"): (
        [moe("vendor.retnet.routed_scale: 2.5")], "layers.2.feed_forward.routed_scale", 2.5),
    ("Moe", "vendor.retnet.normalize_weights"): (
        [moe("vendor.retnet.normalize_weights: false")], "layers.2.feed_forward.normalize_weights", False),
    ("Branched", "branches"): ([branched("selector: null")], "layers.2.mixer.leaves.0.kind", "mamba2"),
    ("Branched", "selector"): ([branched("selector: {type: top_k}")], "layers.2.mixer.top_k", 1),
    ("Selector", "type"): ([branched("selector: {type: top_k}")], "layers.2.mixer.top_k", 1),
    ("Selector", "top_k"): ([branched("selector: {top_k: 2}")], "layers.2.mixer.top_k", 2),
    ("Branched", "vendor.retnet.merge"): ([branched("vendor.retnet.merge: mean")], "layers.2.mixer.merge", "mean"),
    ("Branched", "vendor.retnet.input_scales"): (
        [branched("vendor.retnet.input_scales: {a: 2.0}")], "layers.2.mixer.input_scales", (1.0, 2.0)),
    ("Branched", "vendor.retnet.output_scales"): (
        [branched("vendor.retnet.output_scales: {m: 0.5, a: 2}")], "layers.2.mixer.output_scales", (0.5, 2.0)),
    ("Ffn", "type"): ([(FFN, "ffn: {type: gated_mlp}")], "layers.2.feed_forward.gated", True),
    ("Ffn", "activation"): ([(FFN, "ffn: {type: mlp, activation: relu}")], "layers.2.feed_forward.activation", "relu"),
    ("Ffn", "bias"): ([(FFN, "ffn: {type: mlp, bias: true}")], "layers.2.feed_forward.bias", True),
    ("Norm", "type"): ([template_a("norm: {type: layernorm}")], "layers.2.norm", "layer"),
    ("Norm", "position"): ([template_a("norm: {position: post}")], "layers.2.norm_position", "post"),
    ("Residual", "type"): ([template_a("residual: {type: parallel}")], "layers.2.residual", "parallel"),
    ("Residual", "scaling"): ([template_a("residual: {scaling: 0.5}")], "layers.2.residual_scale", 0.5),
    ("State", "kv_cache"): ([template_a("state: {kv_cache: false}")], "layers.2.keeps_state", False),
    ("Entry", "template"): ([("template: a", "template: r")], "layers.2.mixer.kind", "retention"),
    ("Entry", "repeat"): ([("repeat: 2", "repeat: 3")], "layers.2.mixer.kind", "retention"),
    ("Entry", "override"): (
        [("template: a", "template: a\n  override: {residual: {scaling: 0.1}}")], "layers.2.residual_scale", 0.1),
    ("Head", "tie_weights"): ([head("tie_weights: false")], "tie_embeddings", False),
    ("Head", "type"): ([multi_token("n_predict: 1")], "mtp.block.mixer.kind", "attention"),
    ("Head", "mtp"): ([multi_token("n_predict: 1")], "mtp.loss_weight", 0.1),
    ("MultiToken", "head_template"): ([multi_token("n_predict: 1")], "mtp.block.norm", "rms"),
    ("MultiToken", "n_predict"): ([multi_token("n_predict: 3")], "mtp.num_modules", 3),
    ("MultiToken", "head_layers"): ([multi_token("head_layers: 2")], "mtp.num_blocks", 2),
    ("MultiToken", "train_loss_weight"): ([multi_token("train_loss_weight: 0.5")], "mtp.loss_weight", 0.5),
    ("Mup", "base_width"): ([mup("base_width: 16")], "logit_scale", 0.25),
    ("Mup", "base_head_dim"): ([mup("base_width: 16, base_head_dim: 4")], "layers.2.mixer.scale", 0.125),
    ("Head", "logit_softcap"): ([head("logit_softcap: 30.0")], "logit_soft_cap", 30.0),
}  # fmt: skip
HINTS = {
    "init: normal_0.5": ("init_std", 0.5),
    "init: paper": ("init", "paper"),
    "init: torchscale": ("init", "torchscale"),
    "dropout: 0.2": ("layers.0.dropout", 0.2),
    "checkpointing: true": ("gradient_checkpointing", True),
    "seed: 7": ("seed", 7),
    "vendor.retnet.mup: {base_width: 32}": ("mup_base_width", 32),
}
OPTIONS = {
    "key_dim": "32", "value_dim": "64", "decay": "gated", "learnable_decay": "true", "decay_norm": "true",
    "decay_scale": "0.5", "qkv_activation": "silu", "head_norm_groups": "1",
    "conv_width": "4", "conv_activation": "none", "qk_norm": "l2",
    "rotary": "half", "gate": "none", "head_norm": "rms", "head_norm_affine": "shared", "head_norm_eps": "1.0e-3",
}  # fmt: skip


def field(config: ModelConfig, path: str) -> Any:
    """The value at a path such as 'layers.2.mixer.window'; None where a layer has no such field."""
    value: Any = config
    for step in path.split("."):
        value = value[int(step)] if step.isdigit() else getattr(value, step, None)
    return value


@pytest.mark.parametrize("key", CHANGES, ids=".".join)
def test_a_key_reaches_its_field(key):
    pairs, path, value = CHANGES[key]
    assert field(built(), path) != value
    assert field(built(*pairs), path) == value


def test_layers_of_one_entry_share_a_configuration():
    """A configuration per layer takes seconds at the most layers that a stack may have."""
    layers = model_config(stack(("repeat: 2", "repeat: 4095"))).layers
    assert len(layers) == 4096
    assert len({id(layer) for layer in layers}) == 2


def test_the_final_norm_has_the_type_of_the_last_layer_and_is_absent_after_a_post_norm():
    assert built(template_a("norm: {type: layernorm}")).final_norm == "layer"
    assert built(template_a("norm: {position: post}")).final_norm == "none"


@pytest.mark.parametrize("hint", HINTS)
def test_a_training_hint_reaches_the_model(hint):
    path, value = HINTS[hint]
    assert field(built(), path) != value
    assert field(built(more=f"training_hints: {{{hint}}}\n"), path) == value


@pytest.mark.parametrize("option", OPTIONS)
def test_a_vendor_option_reaches_the_retention_field_of_the_same_name(option):
    others = "vendor.retnet.conv_width: 4, " if option == "conv_activation" else ""
    mixer = built((RETNET, f"retnet: {{{others}vendor.retnet.{option}: {OPTIONS[option]}}}")).layers[0].mixer
    assert getattr(mixer, option) != getattr(built().layers[0].mixer, option)


@pytest.mark.parametrize(
    ("options", "rotary", "absorbs"),
    [
        ("", "none", True),
        (", vendor.retnet.rope: false", "none", True),
        (", vendor.retnet.rope: true", "half", False),
        (", vendor.retnet.mla.rope_dim: 8", "half", True),
        (", vendor.retnet.rope: true, vendor.retnet.mla.rope_dim: 8", "half", True),
        (", vendor.retnet.qk_norm: rms", "none", False),
    ],
)
def test_latents_have_no_positions_unless_they_are_asked_for(options, rotary, absorbs):
    found = stack((ATTENTION, f"attention: {{latent_dim: 16{options}}}"))
    mixer = model_config(found).layers[2].mixer
    assert (mixer.kind, mixer.rotary, mixer.absorbs) == ("latent_attention", rotary, absorbs)
    words = found.layers[2].mixer.words("attention")
    assert ("absorbed" in words, "keys rebuilt" in words) == (absorbs, not absorbs)


KINDS_OF_ATTENTION = [
    "window: 4, vendor.retnet.rotary_dim: 8",
    "attention_sinks: {n_per_head: 2}, vendor.retnet.rope: false, vendor.retnet.gate: sigmoid",
    "vendor.retnet.qk_norm: l2, vendor.retnet.rope: false",
    "latent_dim: 16, qkv_bias: true",
    "latent_dim: 16, vendor.retnet.mla.rope_dim: 8, vendor.retnet.mla.q_rank: 24, vendor.retnet.mla.norm: rms",
    "latent_dim: 16, window: 5, vendor.retnet.rope: true, attention_sinks: {}",
]


@torch.no_grad()
def test_attention_of_every_kind_beside_rotary_retention_decodes_as_one_forward():
    kinds = "".join(
        f"\n  {name}:\n    mixer: {{type: attention, attention: {{{options}}}}}\n    ffn: {{type: mlp}}"
        for name, options in zip("bcdefg", KINDS_OF_ATTENTION, strict=True)
    )
    listed = "".join(f"\n- template: {name}" for name in "bcdrefgr")
    text = changed(
        ("    ffn: {type: mlp}", f"    ffn: {{type: mlp}}{kinds}"), ("- template: a", f"- template: a{listed}")
    )
    model = unit_gain_(LanguageModel(model_config(parse_stack(text))).double()).eval()
    ids = torch.arange(11)[None] % 7
    whole = model(ids).logits
    state, logits = None, []
    for part in ids.split((5, 1, 1, 3, 1), 1):
        output = model(part, state, carry=True)
        state = output.state
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-10, atol=1e-10)


def test_a_list_of_decays_reaches_the_layer():
    config = built((RETNET, "retnet: {vendor.retnet.decay: [0.5, 0.6, 0.7, 1]}"))
    assert config.layers[0].mixer.decay == (0.5, 0.6, 0.7, 1.0)


@pytest.mark.parametrize("written", ["retnet: {rope: true}", "retnet: {chunk_size: null}"])
def test_without_a_chunk_size_the_operator_chooses(written):
    assert built((RETNET, written)).layers[0].mixer.chunk_size is None


@pytest.mark.filterwarnings("error")
def test_a_chunk_size_from_another_program_gives_no_error_and_no_warning():
    found = stack((RETNET, "retnet: {chunk_size: 128}"), ("d_model: 64", "d_model: 256"), heads("dtype: float32"))
    assert [finding.rule for finding in realism_report(found)] == ["param_count_info", "layer_count_info"]
    config = model_config(found)
    assert config.layers[0].mixer.chunk_size == 128
    LanguageModel(config)(torch.arange(200)[None]).logits.sum().backward()


@pytest.mark.parametrize(
    ("pair", "what"),
    [
        ((RETNET, "retnet: {vendor.retnet.head_norm: none}"), "scores of retnet with head_norm: none in template 'r'"),
        ((ATTENTION, "attention: {latent_dim: 16}"), "scores of attention with latent_dim in template 'a'"),
    ],
)
def test_heads_whose_scores_have_no_scale_keep_the_width_of_the_base(pair, what):
    def text(base: int) -> str:
        return changed(pair, more=f"training_hints: {{vendor.retnet.mup: {{base_width: 16, base_head_dim: {base}}}}}\n")

    fault = only(text(4))
    assert what in fault.what
    assert fault.dotted == "training_hints.vendor.retnet.mup.base_head_dim"
    assert faults(text(16)) == []  # that of the stack
    assert model_config(parse_stack(text(16))).mup_base_width == 16


# Keys that do not reach the configuration, and where they are used; keys that are tested in another file.
ELSEWHERE = {
    ("Model", "family_hint"): "report", ("Model", "target_params"): "report",
    ("TokenizerContract", "type"): "one value", ("TokenizerContract", "add_bos"): "tokenizer",
    ("TokenizerContract", "add_eos"): "tokenizer", ("TokenizerContract", "pad_token"): "tokenizer",
    ("Selector", "input"): "one value",
    ("Embedding", "type"): "one value", ("Attention", "window_mode"): "both values mean `window`",
    ("Attention", "window_dilation"): "one value",
    ("Moe", "routing"): "one value", ("Routing", "type"): "one value",
    **dict.fromkeys([("MuonHints", key) for key in MuonHints.model_fields], "training"),
    **dict.fromkeys([("OptimizerGroups", key) for key in OptimizerGroups.model_fields], "training"),
    **dict.fromkeys([("ExecutionMode", key) for key in ExecutionMode.model_fields], "report"),
    ("Residual", "hyper"): "test_hyper_connections.py",
    **{("HyperConnections", key): "test_hyper_connections.py" for key in HyperConnections.keys()},  # noqa: SIM118
    ("Compatibility", "compile_target"): "one value", ("Compatibility", "dtype_policy"): "tested below",
}  # fmt: skip
CONTAINERS = {"Mixer", "Template", "Spec"}  # sections that hold sections


def test_every_key_has_a_test():
    keys = set()
    for section in sections():
        if section.__name__ not in CONTAINERS | {"TrainingHints"} and not section.__name__.endswith("Override"):
            keys |= {(section.__name__, key) for key in section.keys()}  # noqa: SIM118
    ours = {("Retnet", f"vendor.retnet.{option}") for option in OPTIONS}
    assert keys - set(CHANGES) - set(ELSEWHERE) - ours == set()


def test_a_layers_balance_coefficient_defaults_to_the_training_hint():
    hint = "training_hints: {router_aux_loss_coef: 0.3}\n"
    for option, value in (("router: softmax", 0.3), ("load_balance_coef: 0.2", 0.2)):
        assert built(moe(option), more=hint).layers[2].feed_forward.load_balance_coef == value


@pytest.mark.parametrize(("activation", "gated"), [("swiglu", True), ("gelu", False), ("relu", False)])
def test_only_swiglu_experts_are_gated(activation, gated):
    pair = FFN, f"ffn: {{type: moe, activation: {activation}, moe: {{experts: 4, top_k: 2}}}}"
    assert built(pair).layers[2].feed_forward.gated is gated


@pytest.mark.parametrize(("d_model", "expand", "width"), [(64, 2, 64), (48, 2, 32), (40, 1, 8), (36, 1, 4)])
def test_the_default_mamba2_head_is_the_largest_power_of_two_that_divides(d_model, expand, width):
    pairs = [("d_model: 64", f"d_model: {d_model}"), ("n_heads: 4", "n_heads: 2"), mamba(f"expand: {expand}")]
    assert built(*pairs).layers[2].mixer.head_dim == width


@pytest.mark.parametrize(("d_model", "rank"), [(64, 4), (72, 5)])
def test_the_rank_of_mamba1_steps_is_a_sixteenth_of_the_width_rounded_up(d_model, rank):
    pairs = [("d_model: 64", f"d_model: {d_model}"), mamba("variant: mamba1")]
    assert built(*pairs).layers[2].mixer.time_step_rank == rank


def test_a_yarn_length_is_at_least_one_token():
    assert built(positional("rope_scaling: {type: yarn, factor: 1000.0}")).layers[0].mixer.rotary_yarn_length == 1


def test_layered_safe_keeps_norms_and_routers_in_float32():
    pairs = [positional("tie_word_embeddings: false"), moe("router: softmax")]
    model = LanguageModel(built(*pairs, more="compatibility: {dtype_policy: layered_safe}\n"))
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {name for name, _ in model.named_parameters() if "norm" in name or "router" in name}
    assert len(wide) == 8
    assert model(torch.arange(20)[None]).logits.dtype == torch.bfloat16


def test_layered_safe_keeps_norms_inside_mixers_in_float32():
    affine = "retnet: {vendor.retnet.head_norm_affine: shared, chunk_size: 32}"
    pairs = [mamba("variant: mamba2"), ("retnet: {chunk_size: 32}", affine)]
    model = LanguageModel(built(*pairs, more="compatibility: {dtype_policy: layered_safe}\n"))
    inside = {name: x.dtype for name, x in model.named_parameters() if name.endswith("norm_weight")}
    assert set(inside.values()) == {torch.float32}
    assert len(inside) == 3
    assert model(torch.arange(20)[None]).logits.dtype == torch.bfloat16


def test_a_layer_that_may_not_keep_its_state_is_named_in_the_error():
    model = LanguageModel(built(template_a("state: {kv_cache: false}"), heads("dtype: float32")))
    ids = torch.arange(20)[None]
    assert model(ids).logits.shape == (1, 20, 257)
    with pytest.raises(ValueError, match="layer 2: keeps_state is False"):
        model(ids, carry=True)
    with pytest.raises(ValueError, match="layer 2"):
        model(ids, state=ModelState(()))


def test_a_tiny_yarn_factor_has_a_finite_length():
    config = built(positional("rope_scaling: {type: yarn, factor: 1.0e-300}"))
    assert config.layers[0].mixer.rotary_yarn_length == 2**31 - 1


@pytest.mark.parametrize("scaling", ["{type: linear, factor: 2.0}", "{type: yarn, factor: 2.0}"])
def test_rope_scaling_changes_logits_equally_with_and_without_cache(scaling):
    change, pairs = positional(f"rope_scaling: {scaling}"), [heads("dtype: float32")]
    ids = torch.randint(257, (1, 40), generator=torch.Generator().manual_seed(0))
    plain, scaled = (LanguageModel(built(*pairs, *more)).double().eval() for more in ([], [change]))
    for model in (plain, scaled):  # unit gain: at the usual initialisation positions have little effect
        for parameter in model.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(parameter.shape[-1] ** -0.5)
    full = scaled(ids).logits
    assert (full - plain(ids).logits).norm() > 1e-2 * full.norm()
    before = scaled(ids[:, :25], carry=True)
    after = scaled(ids[:, 25:], before.state).logits
    torch.testing.assert_close(torch.cat([before.logits, after], 1), full, rtol=1e-9, atol=1e-9)
