"""flash-linear-attention's layers and models beside float64 references: whole, in pieces, and the way back."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retnet.layers.mixer_base import MixerModule
from retnet.layers.token_layout import TokenLayout
from retnet.models.convert import convert, load
from retnet.models.convert.fla_layers import LAYERS, load_layer
from retnet.models.convert.mamba import mamba1_config_of
from retnet.models.lm import LanguageModel

from .fla_layer_peers import (
    layer_output,
    layer_state,
    mamba2_logits,
    mamba2_state,
    transformer_logits,
    transformer_state,
)
from .peers import VOCAB, fla_logits, fla_state

WIDTH, T = 24, 13
_HEADS = {"hidden_size": WIDTH, "num_heads": 4}
_MAMBA2 = {"hidden_size": WIDTH, "head_dim": 8, "state_size": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "retention": ("MultiScaleRetention", {**_HEADS, "expand_v": 2.0}),
    "retention, convolution, no gate": (
        "MultiScaleRetention", {**_HEADS, "expand_v": 1.0, "use_short_conv": True, "use_output_gate": False},
    ),
    "simple GLA": ("SimpleGatedLinearAttention", _HEADS),
    "simple GLA, shared keys, no convolution": (
        "SimpleGatedLinearAttention",
        {
            **_HEADS, "num_kv_heads": 2, "use_short_conv": False, "expand_k": 0.5, "expand_v": 2.0, "norm_eps": 1e-3,
            "gate_logit_normalizer": 4, "gate_fn": "sigmoid",
        },
    ),
    "gated retention": ("YOCOGatedRetention", _HEADS),
    "gated retention, YOCO's frequencies": (
        "YOCOGatedRetention",
        {**_HEADS, "num_heads": 2, "rope_inv_freq": "yoco", "rope_theta": 100.0, "gate_logit_normalizer": 8.0},
    ),
    "mamba2": ("Mamba2", _MAMBA2),
    "mamba2, groups, norm before the gate": (
        "Mamba2",
        {
            **_MAMBA2, "n_groups": 3, "norm_before_gate": True, "use_bias": True, "use_conv_bias": False,
            "dt_limit": (0.5, 0.9),
        },
    ),
    "mamba2 without norm": ("Mamba2", {**_MAMBA2, "rmsnorm": False, "conv_kernel": 3}),
    "attention": ("Attention", _HEADS),
    "attention, window": (
        "Attention",
        {**_HEADS, "num_kv_heads": 1, "qk_norm": True, "qkv_bias": True, "window_size": 4, "rope_theta": 50.0},
    ),
}  # fmt: skip
IDS = torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(5))
TRANSFORMER = {
    "model_type": "transformer", "hidden_size": WIDTH, "num_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40,
    "vocab_size": VOCAB, "qk_norm": True, "num_kv_heads": 2, "window_size": 6, "norm_eps": 1e-4,
}  # fmt: skip
MAMBA2 = {
    **_MAMBA2, "model_type": "mamba2", "num_hidden_layers": 2, "vocab_size": VOCAB, "n_groups": 3, "norm_eps": 1e-3,
    "norm_before_gate": True, "dt_limit": [0.2, 2.0],
}  # fmt: skip


def close(ours: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((ours - wanted).norm() <= tolerance * wanted.norm())


def in_pieces(layer: MixerModule, x: Tensor, bounds: list[int]) -> Tensor:
    state, outs = None, []
    for start, end in pairwise(bounds):
        position = None if state is None else state.position
        layout = TokenLayout.of((len(x), end - start), x.device, start=position, carry=True)
        out, state = layer(x[:, start:end], state, layout)
        outs.append(out)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_layer_computes_what_flas_does_whole_and_in_pieces(case):
    kind, options = CASES[case]
    state = layer_state(kind, options)
    x = torch.randn(2, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted, layer = layer_output(kind, state, options, x), load_layer(kind, state, **options)
    assert wanted.std() > 0.01
    assert close(layer(x, None, TokenLayout.of((2, T), x.device))[0], wanted)
    assert close(in_pieces(layer, x, [0, 6, *range(7, T + 1)]), wanted)
    narrow = load_layer(kind, {name: weight.float() for name, weight in state.items()}, **options)
    assert close(narrow(x.float(), None, TokenLayout.of((2, T), x.device))[0], wanted, 1e-5)


def test_every_class_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(LAYERS)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("GatedLinearAttention", {}, "kind is 'GatedLinearAttention'; accepted: .*SimpleGatedLinearAttention"),
        ("Attention", {"num_head": 4}, "Attention has no argument 'num_head'; .*num_heads"),
        ("SimpleGatedLinearAttention", {"feature_map": "relu"}, "feature_map is 'relu'; accepted: None"),
        ("SimpleGatedLinearAttention", {"conv_bias": True}, "conv_bias is True; accepted: False"),
        ("SimpleGatedLinearAttention", {"gate_fn": "gelu"}, "gate_fn is 'gelu'; accepted: swish, silu, sigmoid"),
        ("Mamba2", {"D_has_hdim": True}, "D_has_hdim is True; accepted: False"),
        ("Mamba2", {"num_heads": 3}, "num_heads is 3; accepted: expand"),
        ("Attention", {"num_heads": 5}, "num_heads is 5; accepted: a divisor of hidden_size 24"),
        ("Attention", {"qk_norm": True}, "q_norm.weight is missing"),
        ("Attention", {"num_kv_heads": 2}, r"k_proj.weight has shape \[24, 24\], not \[12, 24\]"),
        ("MultiScaleRetention", {"expand_v": 1.0, "use_output_gate": False}, "g_proj.weight is left over"),
    ],
)
def test_what_our_mixers_lack_and_what_does_not_fit_is_refused_by_name(kind, options, message):
    plain = _MAMBA2 if kind == "Mamba2" else _HEADS
    state = layer_state(kind, plain) if kind in LAYERS else {}
    with pytest.raises(ValueError, match=message):
        load_layer(kind, state, **{**plain, **options})


@torch.no_grad()
def stepwise(model: LanguageModel, split: int) -> Tensor:
    out = model(IDS[:, :split], carry=True)
    logits = [out.logits]
    for t in range(split, T):
        out = model(IDS[:, t : t + 1], out.state, carry=True, in_place=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "qkv_bias": True, "window_size": None}])
def test_a_transformer_of_fla_and_the_way_back(options, tmp_path):
    config = TRANSFORMER | options
    state = transformer_state(config)
    (tmp_path / "fla").mkdir()
    save_file(state, tmp_path / "fla/model.safetensors")
    (tmp_path / "fla/config.json").write_text(json.dumps(config))
    model, wanted = load(tmp_path / "fla"), transformer_logits(state, config, IDS)
    assert close(stepwise(model, T), wanted)
    assert close(stepwise(model, 5), wanted)
    convert(tmp_path / "fla", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", to="fla")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["architectures"] == ["TransformerForCausalLM"]
    assert all(written[key] == value for key, value in config.items())
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], x) for name, x in state.items())


@pytest.mark.parametrize("options", [{}, {"rmsnorm": False, "norm_before_gate": False, "dt_limit": [0.0, 1e9]}])
def test_a_mamba2_of_fla_has_its_own_names_of_fields(options):
    config = MAMBA2 | options
    state = mamba2_state(config)
    model, wanted = load(state, config=config), mamba2_logits(state, config, IDS)
    assert close(stepwise(model, T), wanted)
    assert close(stepwise(model, 5), wanted)
    assert model.config.layers[0].mixer.time_step_lowest == config["dt_limit"][0]


def test_a_mamba_of_fla_is_read_as_that_of_transformers_with_the_same_values():
    theirs = {
        "hidden_size": 32, "vocab_size": VOCAB, "num_hidden_layers": 1, "layer_norm_epsilon": 1e-3, "expand": 1,
        "time_step_rank": 3, "time_step_scale": 0.5, "time_step_min": 0.01, "time_step_max": 0.2,
        "time_step_floor": 1e-3, "initializer_range": 0.02, "tie_word_embeddings": False,
    }  # fmt: skip
    of_fla = {
        "hidden_size": 32, "vocab_size": VOCAB, "num_hidden_layers": 1, "norm_eps": 1e-3, "expand": 1, "dt_rank": 3,
        "dt_scale": 0.5, "dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3, "fuse_norm": True,
    }  # fmt: skip
    assert mamba1_config_of(of_fla) == mamba1_config_of(theirs)


def test_values_of_flas_fields_are_refused_under_its_names():
    with pytest.raises(ValueError, match=r"D_has_hdim is True; accepted: False") as found:
        load(mamba2_state(MAMBA2), config={**MAMBA2, "dt_min": -1, "D_has_hdim": True})
    assert "dt_min is -1; accepted: a positive number" in str(found.value)


def test_attention_layers_of_a_retnet_may_have_several_specifications():
    config = {
        "model_type": "retnet", "hidden_size": 32, "num_heads": 4, "num_hidden_layers": 3, "intermediate_size": 40,
        "norm_eps": 1e-5, "vocab_size": VOCAB,
    }  # fmt: skip
    spec = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 7}
    state = fla_state({**config, "attn": spec})
    model = load(state, config={**config, "attn": [spec, {"layers": [], "num_heads": 8}]})
    with torch.no_grad():
        assert close(model.double()(IDS).logits, fla_logits(state, {**config, "attn": spec}, IDS))
    with pytest.raises(ValueError, match="attn has layer 1 twice; accepted: once"):
        load(state, config={**config, "attn": [spec, {"layers": [2, 1], "num_heads": 8}]})
    with pytest.raises(ValueError, match=r"attn is .*; accepted: an object, a list of objects, or null"):
        load(state, config={**config, "attn": [spec, 3]})
