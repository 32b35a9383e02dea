"""Initial weights of the Hugging Face classes: from torch's seed, and for whatever a checkpoint does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.modeling_layers import GenericForSequenceClassification

import retnet.hf
from retnet.models.hf import RetNetConfig, RetNetForCausalLM, RetNetModel, RetNetPreTrainedModel
from retnet.models.lm import LanguageModel
from tests.small_models import hf_model, random_ids, small_config

CONFIG = small_config("every mixer")
APART = 8  # places between weights that are lacking together: more than a module has


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def directory(tmp_path) -> Path:
    hf_model("every mixer", init="paper").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def garbage_in_freed_memory():
    """Uninitialised memory is rarely zero in a long run; here it holds numbers that no weight has."""
    for size in (2**8, 2**10, 2**12, 2**14):
        blocks = [torch.full((size,), 1e30) for _ in range(64)]
        del blocks


@pytest.mark.parametrize("way", ["class", "from_config", "AutoModelForCausalLM", "base model"])
def test_new_weights_follow_torchs_seed(way):
    make = {
        "class": RetNetForCausalLM,
        "from_config": RetNetForCausalLM._from_config,
        "AutoModelForCausalLM": AutoModelForCausalLM.from_config,
        "base model": RetNetModel,
    }[way]
    models = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        models.append(make(RetNetConfig.of(CONFIG)))
    another = make(RetNetConfig.of(CONFIG))
    assert equal(models[0], models[2])
    assert not equal(models[0], models[1])
    assert not equal(models[2], another), "the next model of one seed is another"
    set_seed(2)
    assert equal(make(RetNetConfig.of(CONFIG)), models[1])


def test_the_core_model_is_drawn_from_its_own_seed_whatever_torchs_is():
    torch.manual_seed(1)
    first = LanguageModel(CONFIG)
    torch.manual_seed(2)
    assert equal(first, LanguageModel(CONFIG))


def test_new_weights_have_the_distribution_of_the_core_model():
    torch.manual_seed(0)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(0)
    model = RetNetForCausalLM(RetNetConfig.of(CONFIG))
    assert equal(model.model, LanguageModel(CONFIG, seed=seed))
    assert model.model.config == CONFIG


def test_loading_leaves_torchs_generator_alone(directory):
    core = LanguageModel(CONFIG)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    RetNetForCausalLM.from_pretrained(directory)
    RetNetForCausalLM.wrap(core)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("remainder", range(APART))
def test_weights_that_a_checkpoint_lacks_are_drawn_as_new_ones_and_the_others_are_loaded(directory, remainder):
    """Every weight is lacking once, and the others of its module are there."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    lacking = set(list(weights)[remainder::APART])
    assert len({name.rpartition(".")[0] for name in lacking}) == len(lacking)
    save_file({n: x for n, x in weights.items() if n not in lacking}, file, metadata={"format": "pt"})
    torch.manual_seed(3)
    model, report = RetNetForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert set(report["missing_keys"]) == lacking
    torch.manual_seed(3)
    new = RetNetForCausalLM(model.config)
    for name, weight in model.named_parameters():
        expected = new.get_parameter(name) if name in lacking else weights[name]
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mismatched_weights_are_drawn_anew_where_that_is_allowed(tmp_path, tied, dtype):
    hf_model("every mixer", init="paper", tie_embeddings=tied).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        RetNetForCausalLM.from_pretrained(tmp_path, vocab_size=300)
    model = RetNetForCausalLM.from_pretrained(tmp_path, vocab_size=300, ignore_mismatched_sizes=True, dtype=dtype)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (300, 32)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert 0.015 < layer.weight.std() < 0.025, "init_std is 0.02"
        assert layer.weight.dtype == dtype
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model(torch.full((1, 4), 299)).logits.isfinite().all()


class Scorer(RetNetModel):
    """A user's model: the body with a head of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 50)
        self.post_init()


class RetNetForSequenceClassification(GenericForSequenceClassification, RetNetPreTrainedModel):
    """transformers' own way of a classifier."""


@pytest.mark.parametrize("kind", [Scorer, RetNetForSequenceClassification])
def test_the_head_of_a_users_model_is_drawn_as_transformers_does(directory, kind):
    torch.manual_seed(0)
    model, report = kind.from_pretrained(directory, num_labels=50, output_loading_info=True)
    assert {name for name in report["missing_keys"] if "score" not in name} == set()
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.score.bias is None or not model.score.bias.any()
    body = model.model if kind is Scorer else model.model.model
    assert equal(body, RetNetForCausalLM.from_pretrained(directory).model)
    torch.manual_seed(1)
    assert not torch.equal(kind.from_pretrained(directory, num_labels=50).score.weight, model.score.weight)


def test_a_classifier_trains_and_is_saved(directory, tmp_path):
    model = RetNetForSequenceClassification.from_pretrained(directory, num_labels=3)
    model.config.pad_token_id = 0
    ids = random_ids(2, 6, low=1)
    output = model(ids, labels=torch.tensor([0, 2]))
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.save_pretrained(tmp_path / "again")
    again = RetNetForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, output.logits)


def test_apply_draws_the_whole_model_anew():
    model = RetNetForCausalLM(RetNetConfig.of(CONFIG))
    model.model.final_norm.weight.data.fill_(7.0)
    torch.manual_seed(0)
    model.apply(model._init_weights)
    torch.manual_seed(0)
    assert equal(model, RetNetForCausalLM(RetNetConfig.of(CONFIG)))


def test_llama_behaves_alike(tmp_path):
    """The behaviours above are those of a native model."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(1)
    first = LlamaForCausalLM(config)
    assert not equal(first, LlamaForCausalLM(config))
    torch.manual_seed(1)
    assert equal(first, LlamaForCausalLM(config))
    first.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, vocab_size=90, ignore_mismatched_sizes=True)
    assert 0.015 < model.lm_head.weight.std() < 0.025


def test_the_classes_are_exported():
    assert retnet.hf.RetNetPreTrainedModel is RetNetPreTrainedModel
