"""Summaries of layers: words, reach and parameters."""

import pytest

from retnet.layers.block import Block
from retnet.stack.build import model_config
from retnet.stack.summary import runs, summarize

from .specs import stack

MIXER_A = "type: attention\n      attention: {window: 16}"


def summaries(*pairs):
    found = stack(*pairs)
    return summarize(found, model_config(found))


def test_parameters_are_those_of_the_built_block():
    found = stack()
    config = model_config(found)
    for row, block in zip(summarize(found, config), config.layers, strict=True):
        module = Block(block, config.d_model)
        mixer = sum(p.numel() for part in (module.mixer, module.mixer_norm) for p in part.parameters())
        total = sum(p.numel() for p in module.parameters())
        assert (row.mixer_parameters, row.feed_forward_parameters) == (mixer, total - mixer)


@pytest.mark.parametrize(
    ("mixer", "words", "reach"),
    [
        ("type: attention", "attention", None),
        ("type: attention\n      attention: {window: 16}", "attention, window 16", (16.0,)),
        (
            "type: attention\n      attention: {vendor.retnet.rope: false, vendor.retnet.qk_norm: rms, "
            "vendor.retnet.gate: sigmoid}",
            "attention, no rotation, rms norm of q and k, sigmoid gate",
            None,
        ),
        ("type: attention\n      attention: {attention_sinks: {}}", "attention, a sink per head", None),
        (
            "type: attention\n      attention: {window: 4, vendor.retnet.rotary_dim: 8, "
            "attention_sinks: {n_per_head: 2, learnable: false}}",
            "attention, window 4, rotation of 8, 2 fixed sinks per head",
            (4.0,),
        ),
        (
            "type: attention\n      attention: {latent_dim: 16}",
            "attention, latents of 16, absorbed, no rotation",
            None,
        ),
        (
            "type: attention\n      attention: {latent_dim: 16, vendor.retnet.mla.rope_dim: 8, "
            "vendor.retnet.mla.q_rank: 24, vendor.retnet.mla.norm: rms}",
            "attention, latents of 16, absorbed, queries of rank 24, rotation of 8 beside, rms norm of latents",
            None,
        ),
        (
            "type: attention\n      attention: {latent_dim: 16, window: 4, vendor.retnet.rope: true}",
            "attention, latents of 16, keys rebuilt, window 4",
            (4.0,),
        ),
        ("type: mamba", "mamba2, state 64", None),
        ("type: mamba\n      mamba: {variant: mamba1, d_state: 16}", "mamba1, state 16", None),
        ("type: hyena\n      hyena: {depth: 3}", "hyena, order 3", None),
        ("type: retnet\n      retnet: {vendor.retnet.decay: gated}", "retnet, gated decay", None),
        (
            "type: retnet\n      retnet: {vendor.retnet.decay: gated, vendor.retnet.conv_width: 4}",
            "retnet, gated decay, convolution of 4",
            None,
        ),
        (
            "type: retnet\n      retnet: {vendor.retnet.decay: gated, vendor.retnet.gated_start: experiment, "
            "vendor.retnet.qk_norm: l2, vendor.retnet.gate: sigmoid}",
            "retnet, gated decay from experiment, l2 norm of q and k, sigmoid gate",
            None,
        ),
        (
            "type: retnet\n      retnet: {vendor.retnet.decay: 0.5, vendor.retnet.gate: none}",
            "retnet, custom decay, no gate",
            (7,) * 4,
        ),
        ("type: retnet\n      retnet: {vendor.retnet.decay: 0.5}", "retnet, custom decay", (7,) * 4),  # 0.5 ** 7 < 1%
    ],
)
def test_a_mixer_in_words_and_its_reach(mixer, words, reach):
    row = summaries((MIXER_A, mixer))[2]
    assert (row.mixer, row.reach) == (words, reach)


def test_the_reach_of_paper_retention_grows_from_head_to_head():
    [first, *_] = summaries()
    assert first.mixer == "retnet"
    assert list(first.reach) == sorted(first.reach)
    assert len(first.reach) == 4


@pytest.mark.parametrize(
    ("ffn", "words"),
    [
        ("{type: mlp}", "MLP (gelu) 256"), ("{type: mlp, activation: relu}", "MLP (relu) 256"),
        ("{type: gated_mlp}", "SwiGLU 256"), ("{type: gated_mlp, activation: gelu}", "GeGLU 256"),
        ("{type: moe, moe: {experts: 8, top_k: 2}}", "2 of 8 experts, MLP (gelu) 256"),
        ("{type: moe, activation: swiglu, moe: {experts: 8, top_k: 1}}", "1 of 8 experts, SwiGLU 256"),
    ],
)  # fmt: skip
def test_a_feed_forward_in_words(ffn, words):
    assert summaries(("{type: mlp}", ffn))[2].feed_forward == words


def test_equal_layers_in_a_row_are_one_run():
    assert [(count, row.layer.index) for count, row in runs(summaries())] == [(2, 0), (1, 2)]
    apart = ("- {template: r, repeat: 2}\n- template: a", "- template: r\n- template: a\n- template: r")
    assert [count for count, _ in runs(summaries(apart))] == [1, 1, 1]
    scaled = ("- template: a", "- template: a\n- {template: a, override: {residual: {scaling: 0.5}}}")
    assert [count for count, _ in runs(summaries(scaled))] == [2, 1, 1]
