"""Random models of transformers at unit gain, and their logits beside those of our models of the same weights."""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import modeling_rope_utils

from retnet.models.config import ModelConfig
from retnet.models.convert import load
from retnet.models.lm import LanguageModel

VOCAB = 53


class _Widened(SimpleNamespace):
    """torch with float64 in place of float32."""

    float = float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


def widen(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Let the casts to float32 in modules of transformers, and in their rotary angles, be casts to float64."""
    for module in (*modules, modeling_rope_utils):
        monkeypatch.setattr(module, "torch", _Widened())
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def peer(options: dict, dtype: torch.dtype) -> transformers.PreTrainedModel:
    options = dict(options)
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    config._experts_implementation = "eager"  # grouped products take no float64
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
        # Bamba counts positions from 0 in every call that does not give them; `generate` gives them.
        place = {"position_ids": torch.full((len(ids), 1), t)} if name == "past_key_values" else {}
        out = model(ids[:, t : t + 1], use_cache=True, **place, **{name: getattr(out, name)})
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
