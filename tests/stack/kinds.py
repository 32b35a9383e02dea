"""A specification of each kind that the schema has beyond plain layers: those that run, and those refused by name.

Each is `specs.BASE` with a change: two retention layers and one of attention, which read bytes.
"""

from tests.stack.specs import changed

_R_MIXER = "      retnet: {chunk_size: 32}\n    ffn: {type: gated_mlp}\n"
_A_MIXER = "attention: {window: 16}"
_A_FFN = "ffn: {type: mlp}"
_SCHEDULE = "- {template: r, repeat: 2}\n- template: a\n"
_HEAD = "type: causal_lm\n"


def _experts(more: str) -> str:
    return changed((_A_FFN, f"ffn: {{type: moe, activation: swiglu, moe: {{experts: 8, top_k: 2, {more}}}}}"))


def _attention(settings: str) -> str:
    return changed((_A_MIXER, f"attention: {{{settings}}}"))


def _template(keys: str) -> str:
    """Retention layers with more keys of a template."""
    return changed((_R_MIXER, f"{_R_MIXER}    {keys}\n"))


def _hyper(settings: str) -> str:
    """Hyper-connections in all layers."""
    residual = f"residual: {{type: hyper_connection, hyper: {{{settings}}}}}"
    return changed((_R_MIXER, f"{_R_MIXER}    {residual}\n"), (_A_FFN, f"{_A_FFN}\n    {residual}"))


def _branched(settings: str) -> str:
    mixer = f"      type: branched\n      branched: {{{settings}}}\n    ffn: {{type: gated_mlp}}\n"
    return changed((f"      type: retnet\n{_R_MIXER}", mixer))


def _streams(merge: str) -> str:
    left, right = "{stream: left, body: [{template: r, repeat: 2}]}", "{stream: right, body: [{template: a}]}"
    return changed((_SCHEDULE, f"- template: r\n- {{parallel: [{left}, {right}]{merge}}}\n- template: a\n"))


def _head(settings: str) -> str:
    return changed((_HEAD, f"type: causal_lm_mtp\n  mtp: {{{settings}}}\n"))


def _more(text: str) -> str:
    return changed(more=text)


_PAIR = "branches: {left: {type: retnet, retnet: {chunk_size: 32}}, right: {type: attention, attention: {window: 16}}}"
_TRIPLE = f"{_PAIR[:-1]}, third: {{type: mamba}}}}"
_MUON = "muon: {ns_iters: 3, ns_coefs: [3.4445, -4.775, 2.0315], stabilize_iters: 1, stabilize_coefs: [2.0, -1.5, 0.5]}"

RUN = {
    "affinity: softmax": _experts("affinity: softmax"),
    "affinity: sigmoid": _experts("affinity: sigmoid"),
    "affinity: sqrt_softplus": _experts("affinity: sqrt_softplus, bias_correction: {enabled: true}"),
    "balance: sequence_aux_coef": _experts("balance: {sequence_aux_coef: 1.0e-3}"),
    "balance: group_limit": _experts("balance: {group_limit: 2}, vendor.retnet.groups: 4"),
    "bias_correction": _experts("bias_correction: {enabled: true, update_rate: 1.0e-2, target_imbalance: 0.1}"),
    "shared_experts": _experts("shared_experts: 2"),
    "routing: learned": _experts("routing: {type: learned}"),
    "experts of DeepSeek-V3": _experts(
        "shared_experts: 1, affinity: sigmoid, bias_correction: {enabled: true}, routing: {type: learned}, "
        "balance: {sequence_aux_coef: 1.0e-4, group_limit: 2}, vendor.retnet.groups: 4, vendor.retnet.routed_scale: 2.5"
    ),
    "mtp": _head("head_template: a"),
    "mtp: modules of several layers": _head("head_template: r, n_predict: 2, head_layers: 2, train_loss_weight: 0.3"),
    "attention_sinks": _attention("window: 16, attention_sinks: {n_per_head: 2, learnable: true}"),
    "attention_sinks: fixed": _attention("attention_sinks: {n_per_head: 1, learnable: false}"),
    "latent_dim": _attention("latent_dim: 24"),
    "latent_dim: rotated": _attention("latent_dim: 24, vendor.retnet.rope: true"),
    "latent_dim: rotation beside": _attention(
        "latent_dim: 24, vendor.retnet.mla.rope_dim: 8, vendor.retnet.mla.q_rank: 16, vendor.retnet.mla.norm: rms"
    ),
    "norm, gate and no positions": _attention(
        "vendor.retnet.rope: false, vendor.retnet.qk_norm: rms, vendor.retnet.gate: sigmoid"
    ),
    "branched": _branched(_PAIR),
    "branched: top_k": _branched(f"{_TRIPLE}, selector: {{type: top_k, top_k: 2}}"),
    "branched: sum": _branched(
        f"{_TRIPLE}, vendor.retnet.merge: sum, vendor.retnet.input_scales: {{left: 0.8}}, "
        "vendor.retnet.output_scales: {third: 0.5}"
    ),
    "branched: mean": _branched(f"{_TRIPLE}, vendor.retnet.merge: mean"),
    "parallel: concat": _streams(""),
    "parallel: add": _streams(", merge: {type: add}"),
    "parallel: gated": _streams(", merge: {type: gated}"),
    "parallel: cross_attn": _streams(", merge: {type: cross_attn, from: right, to: left}"),
    "residual: hyper_connection": _hyper("expand: 4, mixing: birkhoff, sinkhorn_iters: 3"),
    "hyper_connection: unconstrained": _hyper("expand: 2, mixing: unconstrained"),
    "hyper_connection: learned_lowrank": _hyper("expand: 2, mixing: learned_lowrank"),
    "optimizer: muon": _more(f"training_hints: {{optimizer: muon, {_MUON}}}\n"),
    "optimizer: hybrid": _more(
        "training_hints: {optimizer: hybrid, optimizer_groups: {muon: ['layers.*.weight'], "
        "adamw: ['embed_tokens.*', 'lm_head.*']}}\n"
    ),
    "mup": _more("training_hints: {vendor.retnet.mup: {base_width: 32}}\n"),
    "execution_modes": _more("execution_modes: [{name: think, max_tokens: 64}, {name: answer, max_tokens: 32}]\n"),
}

_CSA = (
    "compression: {type: csa, m_block: 4, top_k_blocks: 2, "
    "indexer: {arch: relu_mha, n_heads: 2, d_per_head: 8, dtype: fp32}}"
)
_INDEXER = "indexer: {arch: dot_product, n_heads: 2, d_per_head: 8, dtype: bf16}"
_ATTENTION = "layer_templates.a.mixer.attention"

# name -> the text, and the path and the key of the refusal.
REFUSED = {
    "compression: csa": (_attention(_CSA), f"{_ATTENTION}.compression", "compression"),
    "compression: hca": (
        _attention("compression: {type: hca, m_block: 8}"), f"{_ATTENTION}.compression", "compression",
    ),
    "compression: nsa_learned": (
        _attention(f"compression: {{type: nsa_learned, m_block: 4, {_INDEXER}}}"),
        f"{_ATTENTION}.compression", "compression",
    ),
    "window_mode: dilated": (
        _attention("window: 16, window_mode: dilated, window_dilation: 2"), _ATTENTION, "window_mode: dilated",
    ),
    "window_mode: nsa": (_attention("window: 16, window_mode: nsa"), _ATTENTION, "window_mode: nsa"),
    "routing: hash": (
        _experts("routing: {type: hash, hash_salt: 7}"), "layer_templates.a.ffn.moe.routing", "type: hash",
    ),
    "quant_aware_training": (
        _more("compatibility: {quant_aware_training: {enabled: true, dtype: fp8, scope: [ffn], dequant_to: bf16}}\n"),
        "compatibility.quant_aware_training", "quant_aware_training",
    ),
    "integrator: discrete": (
        changed((_SCHEDULE, f"{_SCHEDULE}- integrator: {{type: discrete, steps: 2, body: r}}\n")),
        "layer_schedule[2]", "integrator",
    ),
    "integrator: ode_rk4": (
        changed((_SCHEDULE, f"{_SCHEDULE}- integrator: {{type: ode_rk4, steps: 2, body: r}}\n")),
        "layer_schedule[2]", "integrator",
    ),
    "ttt_layer": (
        changed(("      type: attention\n      attention: {window: 16}\n",
                 "      type: ttt_layer\n      ttt: {inner_model: {type: linear}, inner_lr: 0.01}\n")),
        "layer_templates.a.mixer", "type: ttt_layer",
    ),
    "memory": (
        _template("memory: {type: neural_memory, update_at_inference: true, params: {hidden: 64}}"),
        "layer_templates.r.memory", "memory",
    ),
    "shape_change": (
        _template("shape_change: {d_out: 64, projection: linear}"), "layer_templates.r.shape_change", "shape_change",
    ),
    "transition": (
        _more("execution_modes: [{name: think, max_tokens: 64}]\ntransition: {type: budget_exhausted}\n"),
        "transition", "transition",
    ),
    "depth_gating": (
        changed(("- template: a\n", "- {template: a, depth_gating: {enabled: true, capacity: 0.5}}\n")),
        "layer_schedule[1].depth_gating", "depth_gating",
    ),
}  # fmt: skip
