"""A model that was decoded from is an ordinary model: it is saved, trained, moved, copied and shared as before."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import load_torch_model, save_torch_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed import checkpoint
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from retnet.models.decode.sampling import Sampling
from retnet.models.hf import RetNetForCausalLM
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import hf_model

from .conftest import random_ids

Weights = dict[str, torch.Tensor]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=["generate", "engine"])
def model(request, device) -> Iterator[RetNetForCausalLM]:
    model = hf_model().to(device)
    if request.param == "generate":
        model.generate(random_ids(1, 5).to(device), max_new_tokens=4, do_sample=False)
        yield model
    else:
        engine = Engine(model.model, num_slots=1)
        engine.submit(Request([1, 2, 3], 4, Sampling(temperature=0)))
        engine.run()
        yield model  # while the engine lives
        del engine


def check(saved: Weights, model: RetNetForCausalLM) -> None:
    expected = model.state_dict()
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(saved[name].to(weight.device), weight), name


def test_every_parameter_is_contiguous_and_has_a_storage_of_its_own(model):
    weights = [*model.parameters()]
    assert all(weight.is_contiguous() and weight.storage_offset() == 0 for weight in weights)
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == len(weights)


def by_transformers(model: RetNetForCausalLM, directory: Path) -> Weights:
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def by_safetensors(model: RetNetForCausalLM, directory: Path) -> Weights:
    save_file(model.state_dict(), directory / "file.safetensors")
    return load_file(directory / "file.safetensors")


def by_safetensors_from_modules(model: RetNetForCausalLM, directory: Path) -> Weights:
    save_model(model, str(directory / "model.safetensors"))
    load_model(other := hf_model(seed=5), directory / "model.safetensors")
    return other.state_dict()


def by_huggingface_hub(model: RetNetForCausalLM, directory: Path) -> Weights:
    save_torch_model(model, directory)
    load_torch_model(other := hf_model(seed=5), directory)
    return other.state_dict()


def by_accelerate(model: RetNetForCausalLM, directory: Path) -> Weights:
    Accelerator(cpu=True).save_model(model, directory)
    return load_file(directory / "model.safetensors")


def by_torch(model: RetNetForCausalLM, directory: Path) -> Weights:
    torch.save(model.state_dict(), directory / "weights")
    return torch.load(directory / "weights")


def by_torch_as_a_module(model: RetNetForCausalLM, directory: Path) -> Weights:
    torch.save(model, directory / "module")
    return torch.load(directory / "module", weights_only=False).state_dict()


def by_distributed_checkpoint(model: RetNetForCausalLM, directory: Path) -> Weights:
    checkpoint.save(model.state_dict(), checkpoint_id=directory / "checkpoint", no_dist=True)
    weights = hf_model(seed=5).state_dict()
    checkpoint.load(weights, checkpoint_id=directory / "checkpoint", no_dist=True)
    return weights


SAVERS = [by_transformers, by_safetensors, by_safetensors_from_modules, by_huggingface_hub, by_accelerate]
SAVERS += [by_torch, by_torch_as_a_module, by_distributed_checkpoint]


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_every_weight_is_saved(tmp_path, model, save: Callable[[RetNetForCausalLM, Path], Weights]):
    check(save(model, tmp_path), model)


def test_one_saved_weight_takes_its_own_bytes_alone(model):
    file, weight = io.BytesIO(), model.model.layers[0].mixer.q_proj.weight
    torch.save(weight, file)
    assert len(file.getvalue()) < weight.nbytes + 4096


def test_it_trains_as_a_model_that_was_not_decoded_from(model, device):
    untouched, ids = hf_model().to(device), random_ids(2, 12).to(device)
    losses = []
    for trained in (model, untouched):
        optimizer = torch.optim.AdamW(trained.train().parameters(), lr=1e-2)
        for _ in range(3):
            loss = trained(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_moves_and_is_copied(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    vector_to_parameters(parameters_to_vector(model.parameters()) * 1.0, model.parameters())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    check(before, copied)
    for moved in (copied.double().cpu(), copied.float().to(model.device), copied.to(torch.bfloat16)):
        assert all(weight.is_contiguous() for weight in moved.parameters())
    if model.device.type == "cpu":
        assert all(weight.is_shared() for weight in model.share_memory().parameters())


def test_its_weights_are_replaced(model, device):
    other, ids = hf_model(seed=7).to(device), random_ids(1, 6).to(device)
    model.load_state_dict(other.state_dict(), assign=True)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), other.generate(ids, **options))


def test_adapters_are_added_saved_and_merged(tmp_path, model, device):
    config = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    ids = random_ids(2, 9).to(device)
    with torch.no_grad():
        plain = model(ids).logits
        adapted = get_peft_model(model, config)
        expected = adapted(ids).logits
        assert not torch.allclose(expected, plain)
        adapted.save_pretrained(tmp_path)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        loaded = RetNetForCausalLM.from_pretrained(tmp_path / "merged").to(device)
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(PeftModel.from_pretrained(hf_model(), tmp_path), PeftModel)
