"""Mamba, Mamba-2 and Llama of transformers: the same logits from the same weights, whole and token by token.

Models are random, at unit gain, and saved and read as directories. transformers casts norms, rotary angles and the scan
to float32 whatever the model's dtype; `float64_inside` widens these casts, so that float64 means it on both sides.
"""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import modeling_rope_utils
from transformers.models.llama import modeling_llama
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from retnet.models.config import ModelConfig
from retnet.models.convert import load
from retnet.models.lm import LanguageModel

VOCAB = 53
_BASE = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
_MAMBA2 = {**_BASE, "model_type": "mamba2", "num_heads": 6, "head_dim": 8, "state_size": 7, "chunk_size": 4}
_LLAMA = {**_BASE, "model_type": "llama", "intermediate_size": 40, "num_attention_heads": 4, "pad_token_id": None}
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
}  # fmt: skip


class _Widened(SimpleNamespace):
    """torch with float64 in place of float32."""

    float = float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@pytest.fixture
def float64_inside(monkeypatch):
    for module in (modeling_llama, modeling_rope_utils, modeling_mamba, modeling_mamba2):
        monkeypatch.setattr(module, "torch", _Widened())
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def needs_right_groups(case: str) -> None:
    """Older versions normalise over all groups at once, unlike the kernels that they call where these are installed."""
    norm = inspect.signature(modeling_mamba2.MambaRMSNormGated.__init__)
    if case == "mamba2, groups" and "group_size" not in norm.parameters:
        pytest.skip("the gated norm of Mamba-2 knows no groups in this version of transformers")


def peer(options: dict, dtype: torch.dtype) -> transformers.PreTrainedModel:
    options = dict(options)
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.copy_(noise * (1.0 if "embed" in name else parameter.shape[1] ** -0.5))
            elif name.endswith(("norm.weight", "norm_f.weight", "layernorm.weight", ".D", "A_log")):
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.5 * noise)
    return model


def stepwise(model: nn.Module, ids: Tensor, split: int) -> Tensor:
    """Their logits from a cached prefix, then one token at a time."""
    name = "cache_params" if hasattr(model, "backbone") else "past_key_values"
    out = model(ids[:, :split], use_cache=True)
    logits = [out.logits]
    for t in range(split, ids.shape[1]):
        out = model(ids[:, t : t + 1], use_cache=True, **{name: getattr(out, name)})
        logits.append(out.logits)
    return torch.cat(logits, 1)


def our_stepwise(model: LanguageModel, ids: Tensor, split: int) -> Tensor:
    out = model(ids[:, :split], carry=True)
    logits = [out.logits]
    for t in range(split, ids.shape[1]):
        out = model(ids[:, t : t + 1], out.state, carry=True, in_place=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def compare(options: dict, dtype: torch.dtype, tolerance: float, path) -> None:
    theirs = peer(options, dtype)
    theirs.save_pretrained(path)
    ours = load(path)
    assert next(ours.parameters()).dtype == dtype
    assert ModelConfig.from_dict(json.loads(json.dumps(ours.config.to_dict()))) == ours.config
    ids = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 0.3
        assert error(ours(ids).logits, expected) <= tolerance
        cached = stepwise(theirs, ids, 6)
        assert error(cached, expected) <= tolerance
        assert error(our_stepwise(ours, ids, 6), cached) <= tolerance
        assert error(our_stepwise(ours, ids, 1), cached) <= tolerance
        greedy = theirs.generate(ids[:, :6], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(our_greedy(ours, ids[:, :6], 8), greedy)


def our_greedy(model: LanguageModel, ids: Tensor, count: int) -> Tensor:
    out, tokens = model(ids, carry=True), [ids]
    for _ in range(count):
        tokens.append(out.logits[:, -1:].argmax(-1))
        out = model(tokens[-1], out.state, carry=True, in_place=True)
    return torch.cat(tokens, 1)


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
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'; accepted: default, linear"),
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral'; accepted: 'llama'"),
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
