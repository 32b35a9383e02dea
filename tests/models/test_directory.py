"""Models as directories: saved and loaded to the bit; errors for directories that are not ours or incomplete."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet.models.directory import load_config, load_model, save_model
from retnet.models.lm import LanguageModel
from retnet.models.tensor_files import open_tensors, write_tensors
from tests.small_models import PAPER, small_model

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def model() -> LanguageModel:
    learnable = replace(PAPER, mixer=replace(PAPER.mixer, learnable_decay=True, head_norm_affine="per_head"))
    return small_model([PAPER, learnable], tie_embeddings=True)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_to_the_bit(tmp_path, model, tied):
    if not tied:
        model = LanguageModel(replace(model.config, tie_embeddings=False)).eval()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config == load_config(tmp_path)
    assert not loaded.training
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def test_names_on_disk_are_the_prefix_and_ours_without_a_tied_head(tmp_path, model):
    save_model(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {"model." + name for name in dict(model.named_parameters())}
    assert "model.head.weight" not in names


def test_a_model_is_loaded_in_another_dtype_or_in_its_own(tmp_path, model):
    save_model(model.bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path).embedding.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float64).embedding.weight.dtype == torch.float64


@torch.no_grad()
def test_shards_load_as_one_file_does(tmp_path, model):
    save_model(model, tmp_path)
    write_tensors(tmp_path, open_tensors(tmp_path), shard_bytes=10_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_directories_without_a_model_of_ours_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load_model(tmp_path)
    for text, message in (
        ("{", "config.json is not JSON"),
        ("[]", "config.json is a JSON list; accepted: an object"),
        ('{"model_type": "llama"}', "is of model_type 'llama'; this reads models that retnet saved"),
        ('{"model_type": "retnet", "hidden_size": 8}', "this reads models that retnet saved"),
        ('{"model_type": "retnet", "model_config": {"layer": []}}', r"config.json: .*layers"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_a_directory_without_weights_is_reported(tmp_path, model):
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in"):
        load_model(tmp_path)


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path, model):
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.final_norm.weight"]
    tensors["model.layers.0.mixer.extra"] = torch.zeros(1)
    tensors["model.layers.1.mixer.log_rate"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"are not those of its config\.json") as caught:
        load_model(tmp_path)
    for problem in (
        "final_norm.weight is missing",
        "layers.0.mixer.extra belongs to no layer",
        "layers.1.mixer.log_rate has shape [3], not [2]",
    ):
        assert problem in str(caught.value)
