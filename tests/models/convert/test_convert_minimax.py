"""MiniMax-Text-01 of transformers and of its authors: equal weights give equal logits; what is refused."""

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.minimax import modeling_minimax

import retnet.hf  # registers the classes  # noqa: F401
from retnet.layers.retention import RetentionConfig
from retnet.models.convert import convert, load
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_model
from retnet.serve.engine import Engine
from retnet.serve.request import Request

from .transformers_peers import VOCAB, compare, error, peer, widen

_MINIMAX = {
    "model_type": "minimax", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 20,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "block_size": 4, "pad_token_id": None,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "full_attn_alpha_factor": 1.3, "full_attn_beta_factor": 0.8, "linear_attn_alpha_factor": 1.7,
    "linear_attn_beta_factor": 0.9, "mlp_alpha_factor": 1.2, "mlp_beta_factor": 1.1,
}  # fmt: skip
CASES = {
    "minimax": _MINIMAX,
    "minimax, six heads, a window, one expert": {
        **_MINIMAX, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "num_local_experts": 1,
        "num_experts_per_tok": 1, "sliding_window": 4, "layer_types": None, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
}  # fmt: skip


@pytest.fixture
def float64_inside(monkeypatch):
    widen(monkeypatch, modeling_minimax)
    torch.set_default_dtype(torch.float64)  # of the slopes, which they compute from integers
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("case", list(CASES))
def test_float64_logits_are_those_of_transformers_whole_cached_and_greedy(case, tmp_path):
    compare(CASES[case], torch.float64, 1e-10, tmp_path)


@pytest.mark.parametrize("case", list(CASES))
def test_float32_logits_are_those_of_transformers_whole_cached_and_greedy(case, tmp_path):
    compare(CASES[case], torch.float32, 1e-5, tmp_path)


@pytest.mark.usefixtures("float64_inside")
def test_the_eps_of_the_norm_over_all_heads_is_theirs_where_it_decides():
    """Their output is not scaled by the width of a head, as ours is, so that the eps differs."""
    theirs = peer(_MINIMAX, torch.float64)
    with torch.no_grad():
        for layer in (theirs.model.layers[0], theirs.model.layers[2]):
            layer.self_attn.qkv_proj.weight.mul_(0.1)
    ours, ids = load(theirs.state_dict(), config=_MINIMAX), torch.arange(9)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert error(ours(ids).logits, expected) <= 1e-10
        theirs.model.layers[0].self_attn.norm.variance_epsilon = 0.0
        assert error(theirs(ids).logits, expected) > 1e-3


def test_a_saved_directory_and_a_state_dict_with_fused_experts_give_the_same_model(tmp_path):
    theirs = peer(_MINIMAX, torch.float32)
    theirs.save_pretrained(tmp_path)
    ours, again = load(tmp_path).state_dict(), load(theirs.state_dict(), config=theirs.config).state_dict()
    assert ours.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in ours.items())


def test_a_converted_directory_generates_as_transformers_does_through_every_interface(tmp_path):
    theirs = peer(_MINIMAX, torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ids = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(6))
    expected = theirs.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = expected[0, 9:].tolist()
    face = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    found = face.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert found[0, 9:].tolist() == expected
    ours = load_model(tmp_path / "ours")
    engine = Engine(ours, num_slots=1, max_tokens=64, prompt_chunk=4)
    generation = engine.submit(Request(ids[0].tolist(), 16, Sampling(temperature=0), ignore_eos=True))
    engine.run()
    assert generation.tokens == expected
    with torch.no_grad():
        packed = ours(torch.cat([ids, ids], 1), cu_seqlens=torch.tensor([0, 9, 18])).logits
        assert error(packed[:, 9:], theirs(ids).logits) <= 1e-5


def authors(**changes) -> dict:
    """The configuration as the authors' code has it."""
    names = {"full_attn": "full_attention", "linear_attn": "linear_attention", "mlp": "mlp"}
    factors = {
        f"layernorm_{theirs}_{letter}": _MINIMAX[f"{ours}_{letter}_factor"]
        for ours, theirs in names.items()
        for letter in ("alpha", "beta")
    }
    rest = {key: x for key, x in _MINIMAX.items() if "factor" not in key and key != "layer_types"}
    others = {"model_type": "minimax_text_01", "attn_type_list": [0, 1, 0], "postnorm": True, "rope_theta": 1e6}
    return {**rest, **factors, **others, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", **changes}


def test_the_configuration_of_the_authors_is_read():
    state = peer(_MINIMAX, torch.float32).state_dict()
    assert load(state, config=authors()).config == load(state, config=_MINIMAX).config
    with pytest.warns(UserWarning, match="rotary_dim is 4: .* transformers ignores the key and rotates all 6"):
        attention = load(state, config=authors(rotary_dim=4)).config.layers[1].mixer
    assert attention.rotary_dim == 4


def test_decays_shrink_from_layer_to_layer():
    layers = load(peer(_MINIMAX, torch.float32).state_dict(), config=_MINIMAX).config.layers
    slopes = [-layer.mixer.log_decay for layer in layers if isinstance(layer.mixer, RetentionConfig)]
    torch.testing.assert_close(slopes[0], (1 + 1e-5) * 4.0 ** -torch.arange(1.0, 5.0).double())
    torch.testing.assert_close(slopes[1] / slopes[0], torch.full((4,), 1.5e-5).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: 'silu'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; accepted: num_hidden_layers 3"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1, whose weight would be 1"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; accepted: 0"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic', which changes with"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; accepted: a divisor of hidden_size 24"),
        ({"num_attention_heads": 2**31 - 1}, "num_attention_heads is 2147483647; accepted: an integer from 1 to 65536"),
        ({"num_local_experts": 2**31 - 1}, r"not \[2147483647, 24\]"),
        ({"model_type": "bailing_hybrid"}, "model_type is 'bailing_hybrid': Kimi delta attention, which our layers"),
        (authors(postnorm=False), "postnorm is False; accepted: True"),
        (authors(shared_intermediate_size=[8]), r"shared_intermediate_size is \[8\]; accepted: 0"),
        (authors(attn_type_list=[0, 2, 0]), r"attn_type_list is \[0, 2, 0\]; accepted: a list of 0 \(linear\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_features_that_our_models_lack_are_refused_by_name(change, message):
    state = peer(_MINIMAX, torch.float32).state_dict()
    with pytest.raises(ValueError, match=message):
        load(state, config={**_MINIMAX, **change} if len(change) == 1 else change)


def test_experts_that_are_stored_in_several_dtypes_have_the_values_that_are_stored(tmp_path):
    peer(_MINIMAX, torch.float32).save_pretrained(tmp_path)
    state, place = load_file(tmp_path / "model.safetensors"), "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    state[place] = state[place].bfloat16()
    ours = load(state, config=_MINIMAX).layers[1].feed_forward.down_proj.weight
    assert ours.dtype == torch.float32
    for i, expert in enumerate(ours):
        assert torch.equal(expert, state[place.replace("experts.2", f"experts.{i}")].float())


def test_weights_whose_slopes_are_those_of_another_depth_are_refused():
    state = peer(_MINIMAX, torch.float32).state_dict()
    name = "model.layers.2.self_attn.slope_rate"
    state[name] = state["model.layers.0.self_attn.slope_rate"]
    with pytest.raises(ValueError, match=re.escape(f"{name} is not that of layer 2 of 3")):
        load(state, config=_MINIMAX)


def test_weights_in_half_precision_keep_their_decays(tmp_path):
    """transformers rounds its slopes with the weights; ours come from the configuration."""
    theirs = peer(_MINIMAX, torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.dtype == "bfloat16"
    expected = load(peer(_MINIMAX, torch.float32).state_dict(), config=_MINIMAX).config.layers
    assert ours.config.layers == expected
