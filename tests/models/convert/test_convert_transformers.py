"""Mamba, Mamba-2, Llama, Mistral, Qwen2 and Qwen3 of transformers: equal weights give equal logits, stepwise too.

Models are random, at unit gain, and saved and read as directories. transformers casts norms, rotary angles and the scan
to float32 whatever the model's dtype; `float64_inside` widens these casts, so that float64 means it on both sides.
"""

import inspect

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import retnet.hf  # registers the classes  # noqa: F401
from retnet.models.convert import convert, load
from retnet.models.cost import model_cost
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_config, load_model
from retnet.serve.engine import Engine
from retnet.serve.request import Request

from .transformers_peers import VOCAB, compare, error, peer, widen

_BASE = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
_MAMBA2 = {**_BASE, "model_type": "mamba2", "num_heads": 6, "head_dim": 8, "state_size": 7, "chunk_size": 4}
_LLAMA = {**_BASE, "model_type": "llama", "intermediate_size": 40, "num_attention_heads": 4, "pad_token_id": None}
_MISTRAL = {**_LLAMA, "model_type": "mistral", "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "mamba": {**_BASE, "model_type": "mamba", "state_size": 5},
    "mamba, biases": {
        **_BASE, "model_type": "mamba", "state_size": 3, "time_step_rank": 4, "conv_kernel": 3, "expand": 1,
        "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False,
    },
    "mamba2": {**_MAMBA2, "n_groups": 1},
    "mamba2, groups": {**_MAMBA2, "n_groups": 3, "use_bias": True, "conv_kernel": 3, "tie_word_embeddings": True},
    "llama": _LLAMA,
    "llama, grouped, biases": {
        **_LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
    "llama, wide heads": {**_LLAMA, "num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 1e-3},
    "llama, llama3": {**_LLAMA, "rope_parameters": _LLAMA3},
    "llama, yarn": {
        **_LLAMA, "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.3},
    },
    "llama, yarn of DeepSeek": {
        **_LLAMA, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "mscale": 1.3, "mscale_all_dim": 0.7, "truncate": False,
        },
    },
    "mistral": {**_MISTRAL, "sliding_window": 4},
    "mistral, whole, llama3": {**_MISTRAL, "sliding_window": None, "rope_parameters": _LLAMA3},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2, windows": {
        **_LLAMA, "model_type": "qwen2", "num_hidden_layers": 4, "num_key_value_heads": 2, "sliding_window": 3,
        "use_sliding_window": True, "max_window_layers": 2,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16,
            "attention_factor": 1.4,
        },
    },
    "qwen3, windows": {
        **_LLAMA, "model_type": "qwen3", "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 10,
        "attention_bias": True, "sliding_window": 3, "use_sliding_window": True, "rms_norm_eps": 1e-2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip


@pytest.fixture
def float64_inside(monkeypatch):
    attention = (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3)
    widen(monkeypatch, *attention, modeling_mamba, modeling_mamba2)


def needs_right_groups(case: str) -> None:
    """Older versions normalise over all groups at once, unlike the kernels that they call where these are installed."""
    norm = inspect.signature(modeling_mamba2.MambaRMSNormGated.__init__)
    if case == "mamba2, groups" and "group_size" not in norm.parameters:
        pytest.skip("the gated norm of Mamba-2 knows no groups in this version of transformers")


@pytest.mark.usefixtures("float64_inside")
@pytest.mark.parametrize("case", list(CASES))
def test_float64_logits_are_those_of_transformers_whole_cached_and_greedy(case, tmp_path):
    needs_right_groups(case)
    compare(CASES[case], torch.float64, 1e-10, tmp_path)


@pytest.mark.parametrize("case", list(CASES))
def test_float32_logits_are_those_of_transformers_whole_cached_and_greedy(case, tmp_path):
    needs_right_groups(case)
    compare(CASES[case], torch.float32, 1e-5, tmp_path)


@pytest.mark.parametrize("case", ["mamba", "mamba2", "llama, grouped, biases"])
def test_left_padded_prompts_give_the_logits_of_transformers(case, tmp_path):
    theirs = peer(CASES[case], torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    with torch.no_grad():
        alone = theirs(ids[:1, 4:]).logits
        logits = ours(ids, mask=mask).logits
    assert error(logits[:1, 4:], alone) <= 1e-5


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: 'silu'"),
        ("mamba2", {"num_heads": 5}, "num_heads is 5; accepted"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type is 'dynamic', which changes with the le"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope', which changes with"),
        ("llama", {"rope_parameters": {"rope_type": "axial"}}, "rope_type is 'axial'; accepted: default, linear, ll"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing; accepted with yarn"),
        (
            "llama",
            {"rope_parameters": {"mrope_section": [2, 2]}},
            r"rope_parameters.mrope_section is \[2, 2\]; accepted",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; accepted: 1"),
        ("llama", {"model_type": "gemma"}, "model_type is 'gemma'; accepted: llama, mistral, qwen2, qwen3"),
        ("qwen2, windows", {"layer_types": ["full_attention"]}, "layer_types has 1 entries; accepted: num_hidden_la"),
        ("qwen2, windows", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4}, "without a window"),
    ],
)
def test_features_that_our_models_lack_are_refused_by_name(case, change, message):
    options = CASES[case]
    state = peer(options, torch.float32).state_dict()
    with pytest.raises(ValueError, match=message):
        load(state, config={**options, **change})


def test_rotary_settings_of_transformers_4_are_read():
    state = peer(CASES["llama"], torch.float32).state_dict()
    old = {**_LLAMA, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    mixer = load(state, config=old).config.layers[0].mixer
    assert (mixer.rotary_base, mixer.rotary_factor) == (500.0, 4.0)


@pytest.mark.parametrize("case", ["llama, llama3", "llama, yarn", "mistral", "qwen2, windows", "qwen3, windows"])
def test_a_converted_directory_generates_as_transformers_does_through_every_interface(case, tmp_path):
    options = {**CASES[case], "eos_token_id": [2, 7]}
    theirs = peer(options, torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ids = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(6))
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    face = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert face.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 9:].tolist() == expected
    ours = load_model(tmp_path / "ours")
    assert ours.config.eos_token_ids == (2, 7)
    engine = Engine(ours, num_slots=1, max_tokens=64, prompt_chunk=4)
    generation = engine.submit(Request(ids[0].tolist(), 24, Sampling(temperature=0)))
    engine.run()
    assert generation.tokens == expected
    assert model_cost(ours.config, 64).state_bytes > 0
    with torch.no_grad():
        packed = ours(torch.cat([ids, ids], 1), cu_seqlens=torch.tensor([0, 9, 18])).logits
        assert error(packed[:, 9:], theirs(ids).logits) <= 1e-5


def test_rotary_frequencies_that_early_checkpoints_store_are_not_left_over():
    state = peer(CASES["llama"], torch.float32).state_dict()
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    assert load(state, config=CASES["llama"]).config.layers[0].mixer.rotary_base == 10000.0


def test_several_ends_of_text_are_kept(tmp_path):
    peer({**CASES["llama"], "eos_token_id": [2, 5, 7]}, torch.float32).save_pretrained(tmp_path / "theirs")
    assert load(tmp_path / "theirs").config.eos_token_id == (2, 5, 7)
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert load_config(tmp_path / "ours").eos_token_ids == (2, 5, 7)


def test_mistral_without_a_window_in_its_file_has_the_default_of_transformers():
    state = peer(CASES["mistral"], torch.float32).state_dict()
    options = {key: value for key, value in CASES["mistral"].items() if key != "sliding_window"}
    assert load(state, config=options).config.layers[0].mixer.window == 4096
    assert load(state, config={**options, "sliding_window": None}).config.layers[0].mixer.window is None


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3, windows", "mamba2"])
def test_a_configuration_of_transformers_may_be_given_as_the_object(case):
    theirs = peer(CASES[case], torch.float32)
    state = theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert load(state, config=theirs.config).config.name == theirs.config.model_type
