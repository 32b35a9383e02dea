"""Every linear layer of every mixer and feed-forward is called as a module: adapters, hooks, offloading, quantisation.

A layer whose weight is read around its module computes without the adapter, the hook or the weight on disk.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from retnet.models.hf import RetNetForCausalLM
from tests.small_models import EXPERTS, GATED, HYENA, MAMBA1, MAMBA2, WINDOW, hf_model, random_ids

LAYERS = (
    replace(GATED, feed_forward=replace(EXPERTS, capacity_factor=4.0)),
    replace(MAMBA1, feed_forward=replace(EXPERTS, router="sigmoid", top_k=1)),
    HYENA,
    replace(WINDOW, mixer=replace(WINDOW.mixer, qkv_bias=True, out_bias=True), feed_forward=None),
    MAMBA2,
)
IDS = random_ids(2, 9)


def build() -> RetNetForCausalLM:
    return hf_model(LAYERS)


NAMES = [name for name, module in build().named_modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def uses(model) -> dict[str, torch.Tensor]:
    """What users compute: logits of a whole text, of steps of decoding, and the losses of training and evaluation."""
    step = model(IDS[:, :8], use_cache=True)
    decoded = model(IDS[:, 8:], past_key_values=step.past_key_values, use_cache=True).logits
    results = {"logits": model(IDS, use_cache=False).logits, "decoded": decoded}
    results["evaluation"] = model(IDS, labels=IDS).loss
    results["training"] = model.train()(IDS, labels=IDS).loss
    model.eval()
    return results


@pytest.fixture(scope="module")
def before() -> dict[str, torch.Tensor]:
    """The results of the model as it is built."""
    return uses(build())


def assert_equal(model, expected, tolerance=1e-5):
    for name, x in uses(model).items():
        assert (x - expected[name]).norm() <= tolerance * expected[name].norm(), name


def assert_changed(model, before):
    for name, x in uses(model).items():
        assert (x - before[name]).norm() > 1e-5 * before[name].norm(), name
        assert x.isfinite().all(), name


def test_the_layers_are_those_of_every_mixer():
    kinds = {name.rsplit(".", 1)[-1] for name in NAMES}
    assert {"router", "time_step_proj", "x_proj", "filter_in", "filter_hidden", "filter_out", "decay_proj"} <= kinds
    assert len(NAMES) == 27


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_hook_on_any_layer_changes_what_the_model_computes(name, before):
    model = build()
    hook = model.get_submodule(name).register_forward_hook(lambda layer, args, y: y + y.roll(1, -1))
    assert_changed(model, before)
    hook.remove()
    assert_equal(model, before)


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_on_any_layer_trains_and_merging_it_changes_nothing(name, dora, before):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[name], use_dora=dora, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(build(), config).eval()
    uses(model.base_model.model)  # what inference keeps must not outlive the merge
    assert_changed(model.base_model.model, before)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == (3 if dora else 2)
    for parameter, gradient in trained.items():
        assert gradient is not None, parameter
        assert gradient.norm() > 1e-7, parameter
    model.eval()
    adapted = uses(model.base_model.model)
    with model.disable_adapter():
        assert_equal(model.base_model.model, before)
    assert_equal(model.merge_and_unload(), adapted, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_layer_may_be_quantized(name):
    quantization = pytest.importorskip("torchao.quantization")
    model = build()
    before = uses(model)
    chosen = model.get_submodule(name)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, _: module is chosen)
    assert type(chosen.weight) is not nn.Parameter
    for use, x in uses(model).items():
        assert 0 < (x - before[use]).norm() < 0.3 * before[use].norm(), use


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_model_with_all_layers_on_disk_computes_the_same(tmp_path, dtype):
    build().to(dtype).save_pretrained(tmp_path / "model")
    whole = RetNetForCausalLM.from_pretrained(tmp_path / "model").eval()
    places = {f"model.layers.{n}": "disk" for n in range(len(LAYERS))}
    places |= {f"model.{name}": "disk" for name in ("embedding", "final_norm", "head")}
    spread = RetNetForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    spread.eval()
    with torch.no_grad():
        assert torch.equal(spread(IDS).logits, whole(IDS).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(spread.generate(IDS, **options), whole.generate(IDS, **options))
