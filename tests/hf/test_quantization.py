"""torchao's weight-only quantization of a model in memory, and of a model while it is loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import retnet.hf  # noqa: F401 (registers)
from tests.small_models import hf_model

from .conftest import random_ids

quantization = pytest.importorskip("torchao.quantization")


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


def test_int8_weights_give_nearly_the_same_logits_and_generate(model):
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        weight = model.model.layers[1].mixer.q_proj.weight.detach().clone()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        logits = model(ids).logits
    assert type(model.model.layers[1].mixer.q_proj.weight) is not type(weight)
    assert 0 < relative_error(logits, expected) < 0.1
    cached = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_a_model_is_quantized_while_it_is_loaded(saved):
    plain = AutoModelForCausalLM.from_pretrained(saved)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=config)
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert 0 < relative_error(model(ids).logits, plain(ids).logits) < 0.1


def test_training_with_a_quantized_head_uses_it(retnet_model):
    """The fused loss reads the head's weight; a quantized one goes through the head."""
    ids = random_ids(2, 9)
    expected = hf_model()(ids, labels=ids).loss
    quantization.quantize_(retnet_model, quantization.Int8WeightOnlyConfig())
    output = retnet_model.train()(ids, labels=ids)
    assert output.logits is not None
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.05)
