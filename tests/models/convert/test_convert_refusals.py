"""Configurations and files that are wrong: one error that names the file, the field, what is given and accepted."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from retnet.models import convert
from retnet.models.directory import load_model, save_model
from tests.small_models import small_model

from .peers import FLA_CONFIG, TORCHSCALE_ARGS, fla_state, torchscale_state

_SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2}
_ATTENTION = {**_SMALL, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
CONFIGS = {
    "fla": {**FLA_CONFIG, "attn": {"layers": [1], "num_heads": 4}},
    "torchscale": TORCHSCALE_ARGS,
    "syncdoth": {**TORCHSCALE_ARGS, "model_type": "retnet"},
    "mamba": {**_SMALL, "model_type": "mamba", "state_size": 3},
    "mamba2": {**_SMALL, "model_type": "mamba2", "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "llama": {**_ATTENTION, "model_type": "llama"},
    "mistral": {**_ATTENTION, "model_type": "mistral"},
    "qwen2": {**_ATTENTION, "model_type": "qwen2"},
    "qwen3": {**_ATTENTION, "model_type": "qwen3", "head_dim": 8},
}
DEPTH = {"torchscale": "decoder_layers", "syncdoth": "decoder_layers"}
EPS = {
    "fla": "norm_eps", "torchscale": "layernorm_eps", "syncdoth": "layernorm_eps", "mamba": "layer_norm_epsilon",
    "mamba2": "layer_norm_epsilon",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    made = {
        "fla": fla_state({**CONFIGS["fla"], "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 4}}),
        "torchscale": torchscale_state(TORCHSCALE_ARGS),
        "syncdoth": torchscale_state(TORCHSCALE_ARGS, prefix="model.", head="lm_head.weight"),
    }
    for name in ("mamba", "mamba2", "llama", "mistral", "qwen2", "qwen3"):
        config = transformers.AutoConfig.for_model(**CONFIGS[name])
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        made[name] = state
    return made


def write(directory: Path, state: dict[str, torch.Tensor], config: object) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({name: x.contiguous() for name, x in state.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layers", [0, -1, 2.5, "2", True, [2], 10**4, 10**7, 10**9, 10**30, math.nan, math.inf])
def test_a_number_of_layers_that_is_none_is_refused_at_once(name, layers, weights, tmp_path):
    key = DEPTH.get(name, "num_hidden_layers")
    source = write(tmp_path / name, weights[name], {**CONFIGS[name], key: layers})
    began = time.perf_counter()
    named = rf"layer \d of {layers} is missing" if layers == 10**4 else rf"config.json: .*{key} is .*; accepted: an int"
    with pytest.raises(ValueError, match=named):
        convert.load(source)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("eps", [math.nan, -1e-6, math.inf, "1e-6", 2, True, [1e-6]])
def test_an_eps_that_is_none_is_refused(name, eps, weights, tmp_path):
    key = EPS.get(name, "rms_norm_eps")
    source = write(tmp_path / name, weights[name], {**CONFIGS[name], key: eps})
    with pytest.raises(ValueError, match=rf"config.json: .*{key} is .*; accepted: a number from 0 to 1"):
        convert.load(source)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fla", {"num_heads": "2"}, "num_heads is '2'; accepted: an integer from 1"),
        ("fla", {"attn": 5}, "attn is 5; accepted: an object, a list of objects, or null"),
        ("fla", {"attn": {"layers": "x", "num_heads": 4}}, "attn: layers is 'x'; accepted: a list of layer numbers"),
        ("fla", {"attn": {"layers": [3], "num_heads": 4}}, "attn.layers has 3; accepted: 0 to 2"),
        ("fla", {"attn": {"layers": [1], "num_heads": 5}}, "attn.num_heads is 5; accepted: a divisor of hidden_size"),
        ("fla", {"attn": {"layers": [True], "num_heads": 4}}, "attn: layers is"),
        ("fla", {"expand_k": 1e300}, "expand_k is 1e\\+300; accepted: a number above 0, at most 1024"),
        ("fla", {"eos_token_id": "2"}, "eos_token_id is '2'; accepted: an integer, a list of integers, or null"),
        ("fla", {"bos_token_id": [1, 2]}, r"bos_token_id is \[1, 2\]; accepted: an integer or null"),
        ("fla", {"vocab_size": "61"}, "vocab_size is '61'; accepted: an integer"),
        ("fla", {"use_output_gate": "yes"}, "use_output_gate is 'yes'; accepted: true or false"),
        ("fla", {"num_heads": "2", "norm_eps": -1}, "norm_eps is -1; .*num_heads is '2'"),  # all at once
        ("torchscale", {"dropout": 1.0}, "dropout is 1.0; accepted: 0 <= rate < 1"),
        ("syncdoth", {"forward_impl": 3}, "forward_impl is 3; accepted: parallel, recurrent, chunkwise"),
        ("mamba", {"time_step_rank": "x"}, "time_step_rank is 'x'; accepted: an integer, or 'auto'"),
        ("mamba2", {"time_step_limit": [1, "x"]}, r"time_step_limit is \[1, 'x'\]; accepted: two numbers"),
        ("mamba2", {"time_step_limit": [2, 1]}, r"time_step_limit is \[2, 1\]; accepted: two numbers"),
        ("mamba", {"intermediate_size": 7}, r"intermediate_size is 7; accepted: expand \* hidden_size = 32"),
        ("llama", {"dtype": "int8"}, "dtype is 'int8'; accepted: float32, float16, bfloat16, float64"),
        ("llama", {"torch_dtype": 5}, "torch_dtype is 5; accepted: float32"),
        ("llama", {"initializer_range": 1e9}, "initializer_range is 1000000000.0; accepted: a number from 0 to 1"),
        ("llama", {"num_attention_heads": 3}, "num_attention_heads is 3; accepted: a divisor of hidden_size 16"),
        ("llama", {"rope_theta": -1}, "rope_theta is -1; accepted: a positive number"),
        ("llama", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; accepted: an object, or null"),
        ("llama", {"rope_scaling": {"type": 4}}, "rope_scaling: type is 4; accepted: default"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; accepted: an integer from 1"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types is 'full_attention'; accepted: a list"),
        ("mistral", {"attention_bias": True}, "attention_bias is True, which changes what .*; accepted: null or false"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias is True, which changes"),
        ("llama", {"sliding_window": 4}, "sliding_window is 4, which changes"),
        ("llama", {"logits_scaling": 8.0}, "logits_scaling is 8.0, which changes what the layers compute; accepted: 1"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8, which changes"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is .*, which changes"),
        ("llama", {"layer_types": ["sliding_attention"]}, "layer_types is .*; accepted: 'full_attention' for all"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types is .*; accepted: 'sliding_attention' for all"),
        ("mamba", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, which changes"),
        ("fla", {"qk_norm": True, "num_heads": "2"}, "num_heads is '2'.*; qk_norm is True"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_what_is_accepted(name, change, message, weights, tmp_path):
    source = write(tmp_path / name, weights[name], {**CONFIGS[name], **change})
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        convert.load(source)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_bound_the_vocabulary_and_the_width(name, weights, tmp_path):
    key = "decoder_embed_dim" if name in DEPTH else "hidden_size"
    for change in ({"vocab_size": 2**31 - 1}, {key: 2**31 - 2}):
        source = write(tmp_path / name, weights[name], {**CONFIGS[name], **change})
        with pytest.raises(ValueError, match=r"has shape|accepted"):
            convert.load(source)


def test_our_own_configuration_is_bounded_too(tmp_path):
    save_model(small_model(), tmp_path)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    (run,) = data["model_config"]["layers"]

    def refused(match: str, **changes) -> None:
        kept = {key: value for key, value in data.items() if key not in ("hidden_size", "vocab_size")}
        kept = {key: value for key, value in kept.items() if not key.startswith(("num_", "initializer_"))}
        file.write_text(json.dumps(kept | {"model_config": data["model_config"] | changes}))
        with pytest.raises(ValueError, match=match):
            load_model(tmp_path)

    refused("more than 10000 layers", layers=[run | {"repeat": 6000}] * 5000)
    refused("layer 2 of 10000 is missing", layers=[run | {"repeat": 10_000}])
    refused("expected an integer of 64 bits", vocab_size=10**30)
    refused(r"embedding.weight has shape \[61, 32\]", d_model=2**62)
    refused("expected a finite number", norm_eps=math.nan)
    refused("norm_eps is -1.0; accepted: a number of at least 0", norm_eps=-1)
    refused("init_std is -1.0; accepted", init_std=-1)
    mixer = run["layer"]["mixer"]
    for key, value in (("head_norm_eps", -1e-6), ("rotary_base", math.inf), ("rotary_factor", -2.0)):
        refused(key, layers=[run | {"layer": run["layer"] | {"mixer": mixer | {key: value}}}])


@pytest.mark.parametrize("shard", [3, None, ["a"], {}, "", "../x", "a/b", "x\0y", 2.5])
def test_an_index_that_names_no_file_is_refused(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValueError, match=r"model.safetensors.index.json"):
        convert.load(tmp_path)


def test_an_index_that_names_a_missing_shard_says_so(tmp_path):
    index = {"weight_map": {"x": "model-00003-of-00003.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"names the shard model-00003-of-00003\.safetensors, which is missing"):
        convert.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.to_sparse, "is torch.sparse_coo, not a dense tensor"),
        (lambda x: x.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, not a floating-point dtype"),
        (lambda x: x.to(torch.complex64), "is torch.complex64, not a floating-point dtype"),
    ],
)
def test_tensors_of_another_kind_are_named(change, message, tmp_path):
    state = torchscale_state(TORCHSCALE_ARGS)
    name = "layers.1.retention.k_proj.weight"
    torch.save(state | {name: change(state[name])}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"{name} {message}"):
        convert.load(tmp_path / "model.pt", config=TORCHSCALE_ARGS)


@pytest.mark.parametrize(
    "decay", [torch.ones(4, dtype=torch.int64), torch.zeros(2, 2), torch.zeros(()), torch.zeros(3)]
)
def test_stored_decays_of_another_shape_or_type_are_refused(decay):
    state = torchscale_state(TORCHSCALE_ARGS) | {"retnet_rel_pos.decay": decay}
    with pytest.raises(ValueError, match=r"retnet_rel_pos\.decay is .*; accepted: a log decay for each of 4 heads"):
        convert.load(state, config=TORCHSCALE_ARGS)


def test_keys_that_change_the_mathematics_are_accepted_with_values_that_change_nothing(weights, tmp_path, recwarn):
    neutral = {
        "attention_bias": False, "logits_scaling": 1.0, "num_experts": 1, "hidden_activation": "silu", "qk_norm": None
    }  # fmt: skip
    for name in ("mistral", "qwen2", "qwen3", "mamba", "fla"):
        convert.load(write(tmp_path / name, weights[name], {**CONFIGS[name], **neutral}))
    assert not [w for w in recwarn if "unknown keys" in str(w.message)]
