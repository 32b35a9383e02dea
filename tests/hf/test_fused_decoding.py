"""The fused decode step under `generate`: the same logits as the modules, and weights that stay ordinary parameters."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from retnet.layers.retention import MultiScaleRetention
from retnet.models.decode.packing import PACKED
from retnet.models.hf import RetNetForCausalLM, StateCache
from tests.small_models import hf_model

from .conftest import random_ids


def generate(model, ids, **options):
    return model.generate(ids, **{"max_new_tokens": 8, "do_sample": False, **options})


def step_and_cache(model, ids):
    """Logits of the last token, which is read alone after the others, and the cache after it."""
    with torch.no_grad():
        cache = model(ids[:, :-1], past_key_values=StateCache()).past_key_values
        return model(ids[:, -1:], past_key_values=cache).logits, cache


def step(model, ids):
    return step_and_cache(model, ids)[0]


def is_fused(model) -> bool:
    """Whether one block at least decodes fused."""
    decoder = step_and_cache(model, random_ids(1, 4))[1].decoder
    return decoder is not None and decoder.fused is not None and any(decoder.fused.blocks)


def check(model, ids):
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(step(model, ids), expected, rtol=1e-4, atol=1e-4)


def is_packed(model) -> bool:
    """Whether q, k and v follow each other in memory."""
    mixer = next(layer.mixer for layer in model.model.layers if isinstance(layer.mixer, MultiScaleRetention))
    weights = [proj.weight for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    return [weight.data_ptr() for weight in weights[1:]] == ends[:-1]


def train(model, forward, steps=3):
    """AdamW as the Trainer uses it; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    ids, losses = random_ids(4, 12), []
    for _ in range(steps):
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_step_is_fused_and_gives_the_logits_of_the_whole_context(model):
    ids = random_ids(3, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(step(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert is_fused(model)
    assert is_packed(model)


@pytest.mark.parametrize("reason", ["gradients", "training", "pads", "autocast", "embeddings", "float64"])
def test_the_modules_run_where_the_fused_step_does_not_fit(retnet_model, reason):
    model, ids = retnet_model, random_ids(2, 6)
    cache = model(ids[:, :-1], past_key_values=StateCache()).past_key_values
    last, options = ids[:, -1:], {"past_key_values": cache}
    if reason == "gradients":
        assert model(last, **options).logits.requires_grad
    else:
        with torch.no_grad(), torch.autocast("cpu", enabled=reason == "autocast"):
            if reason == "training":
                model.train()
            elif reason == "pads":
                options["attention_mask"] = torch.tensor([[0], [1]])
            elif reason == "embeddings":
                last, options["inputs_embeds"] = None, model.get_input_embeddings()(last)
            elif reason == "float64":
                model.double()
                options["past_key_values"] = model(ids[:, :-1], past_key_values=StateCache()).past_key_values
            model(last, **options)
    decoder = cache.decoder if reason != "float64" else options["past_key_values"].decoder
    assert decoder is None or decoder.fused is None or not any(decoder.fused.blocks)


def test_a_hook_that_is_added_later_is_called(retnet_model):
    ids, calls = random_ids(1, 6), []
    step(retnet_model, ids)
    handle = retnet_model.model.layers[0].mixer.q_proj.register_forward_hook(lambda *_: calls.append(1))
    step(retnet_model, ids)
    assert len(calls) == 2, "one for the prompt, one for the step"
    handle.remove()
    assert step_and_cache(retnet_model, ids)[1].decoder.fused.blocks[0] is not None


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_change_after_generate_are_the_ones_that_decode(tied):
    """After load_state_dict, in place or assigned, a new dtype and back, a resized vocabulary, a weight set by hand."""
    model, other = hf_model(tie_embeddings=tied), hf_model(tie_embeddings=tied, seed=7)
    ids = random_ids(2, 6)

    generate(model, ids)
    model.load_state_dict(other.state_dict())
    check(model, ids)
    model.load_state_dict(hf_model(tie_embeddings=tied, seed=8).state_dict(), assign=True)
    if tied:
        model.tie_weights()
    check(model, ids)
    model.double().float()
    check(model, ids)
    model.resize_token_embeddings(260)
    check(model, ids)
    model.model.layers[0].mixer.v_proj.weight.data = torch.randn_like(model.model.layers[0].mixer.v_proj.weight)
    check(model, ids)
    assert (model.model.head.weight is model.model.embedding.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_saved_and_copied_after_generate(tmp_path, tied):
    model, ids = hf_model(tie_embeddings=tied), random_ids(2, 6)
    expected = generate(model, ids)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for directory in ("whole", "shards"):
        assert torch.equal(generate(RetNetForCausalLM.from_pretrained(tmp_path / directory), ids), expected)
    if not tied:
        save_file(model.state_dict(), tmp_path / "plain.safetensors")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(generate(copied, ids), expected)
    buffer = io.BytesIO()
    torch.save(copied, buffer)
    buffer.seek(0)
    assert torch.equal(generate(torch.load(buffer, weights_only=False), ids), expected)


def test_training_after_generate_is_training_without_it():
    model, untouched = hf_model(), hf_model()
    ids = random_ids(2, 6)
    generate(model, ids)
    assert all(weight.is_contiguous() for weight in model.parameters())
    assert torch.equal(parameters_to_vector(model.parameters()), parameters_to_vector(untouched.parameters()))
    assert train(model.train(), model) == train(untouched.train(), untouched)
    assert torch.equal(generate(model.eval(), ids), generate(untouched.eval(), ids))
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


def test_a_distributed_model_trains_after_generate(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, untouched = hf_model(), hf_model()
        generate(model, random_ids(2, 6))
        losses = train(model.train(), DistributedDataParallel(model))
        assert losses == train(untouched.train(), DistributedDataParallel(untouched))
        assert losses[-1] < losses[0]
    finally:
        torch.distributed.destroy_process_group()


def test_generate_in_inference_mode_leaves_weights_that_train(retnet_model):
    with torch.inference_mode():
        generate(retnet_model, random_ids(1, 5))
    losses = train(retnet_model.train(), retnet_model)
    assert losses[-1] < losses[0]


def test_weights_that_leave_the_model_are_freed_after_generate(retnet_model):
    def held() -> int:
        """Bytes of packed weights that something still holds."""
        gc.collect()
        plain = (torch.Tensor, torch.nn.Parameter)  # not the fake tensors that earlier exports leave behind
        tensors = [x for x in gc.get_objects() if type(x) in plain and not x.is_meta]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        return sum(storage.nbytes() for storage in storages.values() if getattr(storage, PACKED, False))

    before = held()
    generate(retnet_model, random_ids(2, 6))
    assert held() - before > 0
    retnet_model.half()
    assert held() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_are_near_the_modules(dtype):
    ids = random_ids(2, 9)
    exact = step(hf_model(), ids)
    model = hf_model().to(dtype)
    with torch.no_grad():
        modules = model(ids, use_cache=False).logits[:, -1:].float()
    fused = step(model, ids).float()
    assert is_fused(model)
    assert (fused - exact).norm() <= 2 * (modules - exact).norm()
