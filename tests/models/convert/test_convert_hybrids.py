"""Jamba, Bamba and Falcon-H1 of transformers: equal weights give equal logits, whole, cached and greedy."""

import inspect

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache
from transformers.models.bamba import modeling_bamba
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.jamba import modeling_jamba
from transformers.models.zamba2 import modeling_zamba2

from retnet.models.convert import convert, load
from retnet.models.convert.hybrid import config_of
from retnet.models.cost import parameter_counts
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_model
from retnet.serve.engine import Engine
from retnet.serve.request import Request

from .transformers_peers import VOCAB, compare, error, peer, widen

_BASE = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
}  # fmt: skip
_JAMBA = {
    **_BASE, "model_type": "jamba", "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1,
    "num_experts": 3, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
    "mamba_d_state": 5,
}  # fmt: skip
_BAMBA = {
    **_BASE, "model_type": "bamba", "num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 6,
    "mamba_d_state": 7, "mamba_chunk_size": 4, "num_attention_heads": 3, "num_key_value_heads": 3,
}  # fmt: skip
_FALCON = {
    **_BASE, "model_type": "falcon_h1", "num_hidden_layers": 2, "mamba_d_state": 7, "mamba_chunk_size": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
_FACTORS = {
    "attention_in_multiplier": 0.8, "attention_out_multiplier": 1.3, "embedding_multiplier": 2.5, "key_multiplier": 0.4,
    "lm_head_multiplier": 0.7, "mlp_multipliers": [1.7, 0.6], "ssm_in_multiplier": 1.25,
    # float32 holds these exactly: they are a float32 buffer there.
    "ssm_multipliers": [0.375, 0.5, 2.0, 0.75, 1.5], "ssm_out_multiplier": 0.9,
}  # fmt: skip
CASES = {
    "jamba": _JAMBA,
    "jamba, attention first, no experts": {
        **_JAMBA, "attn_layer_offset": 0, "num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": 3,
        "mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_d_conv": 3, "tie_word_embeddings": True,
    },
    "bamba": _BAMBA,
    "bamba, groups, biases": {
        **_BAMBA, "mamba_n_groups": 3, "mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-3, "attn_layer_indices": [0],
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
    "falcon_h1": {**_FALCON, "mamba_d_ssm": 30, "mamba_n_heads": 6},
    "falcon_h1, factors": {
        **_FALCON, **_FACTORS, "mamba_rms_norm": True, "mamba_n_groups": 2, "mamba_n_heads": 4, "mamba_d_ssm": 16,
        "mlp_bias": True, "attention_bias": True, "head_dim": 6,
    },
    "falcon_h1, gate first, biases": {
        **_FALCON, **_FACTORS, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_d_ssm": None,
        "mamba_n_heads": 6, "mamba_proj_bias": True, "projectors_bias": True, "tie_word_embeddings": True,
    },
}  # fmt: skip


_ZAMBA2 = {
    "model_type": "zamba2", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "n_mamba_heads": 6,
    "layers_block_type": ["mamba", "mamba"], "num_attention_heads": 4, "mamba_d_state": 5, "mamba_ngroups": 2,
}  # fmt: skip


@pytest.fixture
def float64_inside(monkeypatch):
    widen(monkeypatch, modeling_jamba, modeling_bamba, modeling_falcon_h1, modeling_zamba2)


# One case of each kind in the fast tests: the others have the same code behind them.
ONE_EACH = [
    case if case in ("jamba", "bamba", "falcon_h1, factors") else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
]


def needs_a_right_peer(case: str) -> None:
    """Older versions norm over all groups at once, and fail in cached decoding of Falcon-H1 with a norm."""
    norm = inspect.signature(modeling_bamba.BambaRMSNormGated.__init__)
    if case == "bamba, groups, biases" and "group_size" not in norm.parameters:
        pytest.skip("the gated norm of Bamba knows no groups in this version of transformers")
    if CASES[case].get("mamba_rms_norm") and not hasattr(DynamicCache, "get_conv_state"):
        pytest.skip("a cache of Falcon-H1 with a norm does not work in this version of transformers")


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("case", list(CASES))
def test_float64_logits_are_those_of_transformers_whole_cached_and_greedy(case, tmp_path):
    needs_a_right_peer(case)
    compare(CASES[case], torch.float64, 1e-10, tmp_path)


@pytest.mark.parametrize("case", ONE_EACH)
def test_float32_logits_are_those_of_transformers_whole_cached_and_greedy(case, tmp_path):
    needs_a_right_peer(case)
    compare(CASES[case], torch.float32, 1e-5, tmp_path)


@pytest.mark.parametrize("case", ["jamba", "bamba, groups, biases"])
def test_state_dicts_in_memory_with_fused_experts_give_the_same_model(case, tmp_path):
    theirs = peer(CASES[case], torch.float32)
    theirs.save_pretrained(tmp_path)
    names = theirs.state_dict().keys()
    assert ("model.layers.1.feed_forward.experts.gate_up_proj" in names) == case.startswith("jamba")
    ours, again = load(tmp_path), load(theirs.state_dict(), config=theirs.config)
    assert again.config == ours.config
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_converted_model_is_served_as_transformers_generates(case, tmp_path):
    needs_a_right_peer(case)
    theirs = peer(CASES[case], torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ids = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(6))
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 9:]
    engine = Engine(load_model(tmp_path / "ours"), num_slots=1, max_tokens=64, prompt_chunk=4)
    generation = engine.submit(Request(ids[0].tolist(), 12, Sampling(temperature=0), ignore_eos=True))
    engine.run()
    assert generation.tokens == expected.tolist()
    padded, mask = torch.cat([ids[:, :4], ids], 1), torch.tensor([[False] * 4 + [True] * 9])
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert error(engine.model(padded, mask=mask).logits[:, 4:], wanted) <= 1e-5
        packed = engine.model(torch.cat([ids, ids], 1), cu_seqlens=torch.tensor([0, 9, 18])).logits
        assert error(packed[:, 9:], wanted) <= 1e-5


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("jamba", {"model_type": None}, "model_type is missing; accepted: jamba, bamba, falcon_h1, zamba2"),
        ("jamba", {"model_type": "granitemoehybrid"}, "model_type is 'granitemoehybrid'; accepted: jamba, bamba, falc"),
        ("jamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: 'silu'"),
        ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms is False; accepted: True"),
        ("jamba", {"attn_layer_offset": 3}, r"attn_layer_offset is 3; accepted: below attn_layer_period \(3\)"),
        ("jamba", {"mamba_conv_bias": None}, "mamba_conv_bias is null; accepted: true or false"),
        ("jamba", {"num_experts_per_tok": 4}, "num_experts_per_tok is 4; accepted: 1 to 3"),
        ("jamba", {"num_attention_heads": 5}, "num_attention_heads is 5; accepted: a divisor of hidden_size 24"),
        ("jamba", {"sliding_window": 8}, "sliding_window is 8, which changes what the layers compute"),
        ("jamba", {"num_experts": 2}, "router.weight has shape"),
        ("jamba", {"expert_layer_offset": 0}, "model.layers.0.feed_forward"),
        ("falcon_h1", {"projectors_bias": True}, "mamba_proj_bias is False, projectors_bias True; accepted: equal"),
        ("falcon_h1", {"mlp_multipliers": [1.0]}, r"mlp_multipliers is \[1.0\]; accepted: a list of 2 numbers, or nu"),
        ("falcon_h1", {"ssm_multipliers": [1, 1, 1, 1, "2"]}, "ssm_multipliers is .*; accepted: a list of 5 numbers"),
        ("falcon_h1", {"key_multiplier": 0}, "key_multiplier is 0; accepted: a positive number"),
        ("bamba", {"lm_head_multiplier": 2.0}, "lm_head_multiplier is 2.0, which changes what the layers compute"),
        ("bamba", {"attn_layer_indices": [2]}, "attn_layer_indices has 2; accepted: 0 to 1"),
        ("bamba", {"attn_rotary_emb": 8}, "attn_rotary_emb is 8; accepted: half of the heads' width, 4"),
        ("bamba", {"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor is 1.0; accepted: 0.5"),
        ("bamba", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic', which changes with the len"),
        ("bamba", {"mamba_d_head": 5}, "mamba_n_heads is 6, mamba_d_head 5; accepted: a product of 48"),
        ("bamba", {"time_step_limit": [0.5, 0.1]}, "time_step_limit is .*; accepted: two numbers, the first"),
    ],
)  # fmt: skip
def test_what_our_models_lack_and_what_does_not_fit_is_refused_by_name(case, change, message):
    state = peer(CASES[case], torch.float32).state_dict()
    with pytest.raises(ValueError, match=message):
        load(state, config={**CASES[case], **change})


# The shapes of published models, and their numbers of parameters.
PUBLISHED = {
    "Falcon-H1-0.5B": ({
        "model_type": "falcon_h1", "attention_bias": False, "attention_dropout": 0.0, "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 0.9375, "attn_layer_indices": None, "bos_token_id": 1,
        "embedding_multiplier": 5.656854249492381, "eos_token_id": 11, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 2048, "key_multiplier": 0.390625,
        "lm_head_multiplier": 0.0390625, "mamba_chunk_size": 128, "mamba_conv_bias": True, "mamba_d_conv": 4,
        "mamba_d_head": 64, "mamba_d_ssm": 1536, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
        "mamba_n_heads": 24, "mamba_norm_before_gate": False, "mamba_proj_bias": False, "mamba_rms_norm": False,
        "mamba_use_mlp": True, "max_position_embeddings": 16384, "mlp_bias": False, "mlp_expansion_factor": 8,
        "mlp_multipliers": [0.8838834764831844, 0.5859375], "num_attention_heads": 8, "num_hidden_layers": 36,
        "num_key_value_heads": 2, "num_logits_to_keep": 1, "pad_token_id": 0, "projectors_bias": False,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1e11, "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        "ssm_out_multiplier": 0.23570226039551587, "tie_word_embeddings": False, "time_step_floor": 0.0001,
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": "auto", "vocab_size": 32784,
    }, 521e6),
    "Bamba-9B": ({
        "model_type": "bamba", "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "mamba_d_state": 128,
        "num_logits_to_keep": 1, "rope_theta": 10000.0, "vocab_size": 128256,
    }, 9.78e9),
    "Jamba-v0.1": ({
        "model_type": "jamba", "calc_logits_for_entire_prompt": False, "mamba_dt_rank": 256, "n_ctx": 262144,
        "mamba_inner_layernorms": True, "sliding_window": None, "num_logits_to_keep": 1, "vocab_size": 65536,
    }, 51.57e9),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_read_without_a_warning_and_have_their_parameters(name, recwarn):
    source, parameters = PUBLISHED[name]
    config = config_of(source)
    assert not recwarn.list
    assert parameter_counts(config)["total"] == pytest.approx(parameters, rel=2e-3)


@pytest.mark.usefixtures("float64_inside")
def test_a_zamba2_of_mamba_alone_has_the_logits_of_transformers():
    theirs = peer({**_ZAMBA2, "time_step_min": 0.3, "time_step_max": 0.5}, torch.float64)
    ours = load(theirs.state_dict(), config=theirs.config)
    ids = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert error(ours(ids).logits, theirs(ids, use_cache=False).logits) <= 1e-10


@pytest.mark.parametrize("kinds", [["mamba", "hybrid"], ["hybrid", "linear_attention"], None])
def test_shared_blocks_of_zamba2_are_refused_with_the_reason(kinds):
    state = {"model.embed_tokens.weight": torch.zeros(VOCAB, 24)}
    with pytest.raises(ValueError, match=r"layers_block_type is .* a shared block has the same weights"):
        load(state, config={**_ZAMBA2, "layers_block_type": kinds})


def test_experts_that_are_missing_or_there_twice_are_named(tmp_path):
    theirs = peer(CASES["jamba"], torch.float32)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.feed_forward.experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"model.layers.1.feed_forward.*up_proj.* is missing"):
        load(tensors, config=theirs.config)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.feed_forward.experts.[].up_proj.weight"] = torch.zeros(3, 40, 24)
    with pytest.raises(ValueError, match=r"experts.0.up_proj.weight is left over"):
        load(tensors, config=theirs.config)
