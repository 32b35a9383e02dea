"""Small models with transformers' interface, and one saved with its tokenizer."""

from __future__ import annotations

from functools import partial

import pytest

from retnet.models.hf import RetNetForCausalLM
from tests import small_models
from tests.small_models import hf_model

STACKS = ["both decays", "hybrid"]
random_ids = partial(small_models.random_ids, low=1, high=256, seed=1)  # bytes; 0 is the pad


@pytest.fixture(params=STACKS)
def model(request) -> RetNetForCausalLM:
    return hf_model(request.param)


@pytest.fixture
def retnet_model() -> RetNetForCausalLM:
    return hf_model()


@pytest.fixture(scope="session", params=STACKS)
def saved(request, tmp_path_factory) -> str:
    """A byte model saved with its tokenizer."""
    from retnet.models.hf.tokenizer import byte_tokenizer

    directory = tmp_path_factory.mktemp("hf") / "model"
    hf_model(request.param, tie_embeddings=True).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)
