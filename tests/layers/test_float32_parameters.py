"""Learnable rates keep their digits through every cast that a user makes."""

import pytest
import torch

from retnet import LanguageModel
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.retention import RetentionConfig
from tests.small_models import small_model

MIXERS = {
    "retention": RetentionConfig(2, 16, 16, learnable_decay=True),
    "mamba1": Mamba1Config(inner_dim=32, state_dim=4, time_step_rank=2),
    "mamba2": Mamba2Config(inner_dim=32, head_dim=16, state_dim=4),
}


def make_model(mixer: str, dtype: str = "float32") -> LanguageModel:
    return small_model([BlockConfig(MIXERS[mixer], FeedForwardConfig(16))], dtype=dtype)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
def test_a_cast_to_half_precision_leaves_the_rates_as_they_were(mixer, cast):
    model = make_model(mixer)
    before = model.layers[0].mixer.log_rate.clone()
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert torch.equal(model.layers[0].mixer.log_rate, before)
    assert model.embedding.weight.dtype.itemsize == 2
    model(torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()
    assert model.layers[0].mixer.log_rate.grad.dtype == torch.float32


@pytest.mark.parametrize("mixer", MIXERS)
def test_rates_are_float32_in_bfloat16_models_and_float64_after_a_cast_to_double(mixer):
    assert make_model(mixer, "bfloat16").layers[0].mixer.log_rate.dtype == torch.float32
    assert make_model(mixer).double().layers[0].mixer.log_rate.dtype == torch.float64


def test_loading_in_bfloat16_leaves_the_rates_as_they_were(tmp_path):
    from retnet.models.hf import RetNetForCausalLM

    model = make_model("retention")
    RetNetForCausalLM.wrap(model).save_pretrained(tmp_path)
    loaded = RetNetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[0].mixer.log_rate, model.layers[0].mixer.log_rate)
    assert loaded.model.embedding.weight.dtype == torch.bfloat16
