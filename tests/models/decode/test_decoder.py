"""Packed weights beside everything else that a caller may do with a model: the step follows, or the modules run."""

import copy
import gc
import pickle
import threading
from dataclasses import replace
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from retnet.models.decode.decoder import FusedDecoder, running
from retnet.models.decode.fused import FusedModel, fusable_blocks
from retnet.models.decode.generation import generate
from retnet.models.decode.packing import pack
from retnet.models.lm import LanguageModel
from retnet.ops.decode.linear import BLOCK_PRODUCT_ROWS, DecodeWeight, decode_linear
from tests.small_models import PAPER, prompt, random_ids, small_model

LEARNT = replace(PAPER, mixer=replace(PAPER.mixer, learnable_decay=True, head_norm_affine="per_head"))
IDS = random_ids(3, 9)


@torch.no_grad()
def check(model: LanguageModel, decoder: FusedDecoder) -> int:
    """That a step gives the logits of the whole context; how many blocks were fused."""
    _, state = model.hidden(IDS[:, :-1], carry=True)
    assert state is not None
    stepped = decoder.step(IDS[:, -1], state)
    if stepped is None:
        return 0
    torch.testing.assert_close(stepped[0], model(IDS).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert decoder.fused is not None
    return sum(block is not None for block in decoder.fused.blocks)


def decoded(model: LanguageModel) -> tuple[LanguageModel, FusedDecoder]:
    decoder = FusedDecoder(model)
    assert check(model, decoder) == 2
    return model, decoder


class Tripled(nn.Module):
    def forward(self, x):
        return 3 * x


@torch.no_grad()
@pytest.mark.parametrize("other", ["same layer", "another layer", "the same module"])
def test_a_weight_that_two_layers_share_runs_in_the_modules(other):
    model = small_model()
    mixer = model.layers[0].mixer
    if other == "same layer":
        mixer.k_proj.weight = mixer.q_proj.weight
    elif other == "another layer":
        model.layers[1].mixer.q_proj.weight = mixer.q_proj.weight
    else:
        model.layers[1].mixer.q_proj = mixer.q_proj
    decoder = FusedDecoder(model)
    assert check(model, decoder) == (1 if other == "same layer" else 0)
    mixer.q_proj.weight.add_(0.3)
    check(model, decoder)
    assert len(fusable_blocks(model)) == (1 if other == "same layer" else 0)


def test_a_learnt_decay_changed_through_data_is_seen():
    """Averages of weights (EMA) and some optimizers write through `.data`, which leaves no version behind."""
    model, decoder = decoded(small_model((LEARNT,) * 2))
    model.layers[0].mixer.log_rate.data.sub_(1.5)
    assert check(model, decoder) == 2


@pytest.mark.parametrize("part", ["layers.0", "layers.0.mixer", "layers.0.feed_forward", "head", "final_norm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_subclass_with_its_own_forward_is_called(part, when):
    model = small_model()
    decoder = FusedDecoder(model)
    if when == "after":
        check(model, decoder)
    module = model.get_submodule(part)

    def forward(self, *args):
        out = super(type(self), self).forward(*args)
        return (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out

    module.__class__ = type("Sub", (type(module),), {"forward": forward})
    assert check(model, decoder) == (1 if "layers" in part else 2)


@pytest.mark.parametrize("where", ["layers.0.mixer.q_proj", "layers.1.mixer_norm", "head", "final_norm"])
def test_parametrized_and_pruned_weights_are_followed(where):
    model, decoder = decoded(small_model())
    module = model.get_submodule(where)
    parametrize.register_parametrization(module, "weight", Tripled())
    check(model, decoder)
    parametrize.remove_parametrizations(module, "weight")
    assert check(model, decoder) == 2
    prune.random_unstructured(module, "weight", 0.5)
    check(model, decoder)
    prune.remove(module, "weight")
    assert check(model, decoder) == 2


@pytest.mark.parametrize("name", ["head_norm_weight", "log_rate"])
def test_a_parametrized_parameter_of_the_mixer_is_followed(name):
    model, decoder = decoded(small_model((LEARNT,) * 2))
    mixer = model.layers[0].mixer
    parametrize.register_parametrization(mixer, name, Tripled())
    assert check(model, decoder) == 1
    with torch.no_grad():
        mixer.parametrizations[name].original.add_(0.5)
    assert check(model, decoder) == 1


def test_hooks_on_all_modules_are_called():
    model, decoder = decoded(small_model())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert check(model, decoder) == 0
    finally:
        handle.remove()
    assert check(model, decoder) == 2


def test_shared_memory_and_flat_buffers_keep_their_weights():
    """Other processes, or a sharded optimizer, change the weights through that memory."""
    shared = small_model().share_memory()
    assert check(shared, FusedDecoder(shared)) == 0
    assert all(weight.is_shared() for weight in shared.parameters())
    model = small_model()
    weights = list(model.parameters())[::-1]
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, values in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.data = values.view_as(weight)
    decoder = FusedDecoder(model)
    check(model, decoder)
    flat.mul_(1.1)
    assert {weight.untyped_storage().data_ptr() for weight in weights} == {flat.data_ptr()}
    check(model, decoder)


@torch.no_grad()
def test_weights_partly_replaced_are_packed_again():
    model, decoder = decoded(small_model())
    proj = model.layers[0].mixer.v_proj
    proj.weight.data = proj.weight.data * 2  # as PEFT merges an adapter
    assert check(model, decoder) == 2


@pytest.mark.parametrize("leave", [nn.Module.half, lambda model: model.to("meta"), nn.Module.share_memory])
def test_weights_that_leave_the_model_are_freed(leave):
    model = small_model()
    decoder = FusedDecoder(model)
    check(model, decoder)
    packed = ref(decoder.fused.blocks[0].inputs.values.untyped_storage())
    del decoder
    gc.collect()
    assert packed() is not None, "the model's weights lie there"
    leave(model)
    gc.collect()
    assert packed() is None


@torch.no_grad()
def test_a_model_packed_once_is_not_copied_again():
    model = small_model()
    engine, place = FusedModel(model), model.layers[0].mixer.q_proj.weight.data_ptr()
    decoder = FusedDecoder(model)
    assert check(model, decoder) == 2
    q_proj = model.layers[0].mixer.q_proj.weight
    assert q_proj.data_ptr() == place == engine.blocks[0].inputs.values.data_ptr()
    assert decoder.fused.blocks[0].inputs.values.data_ptr() == place
    assert engine.is_current
    q_proj.zero_()
    assert check(model, decoder) == 2


@torch.no_grad()
def test_models_that_share_packed_weights_go_on_sharing_them():
    one, other = decoded(small_model())[0], small_model()
    other.load_state_dict(one.state_dict(), assign=True)
    for model in (other, one):
        assert check(model, FusedDecoder(model)) == 2
    one.layers[0].mixer.v_proj.weight.zero_()
    assert check(other, FusedDecoder(other)) == 2
    assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_weights_made_in_inference_mode_decode():
    with torch.inference_mode():
        model = small_model((LEARNT,) * 2)
        assert check(model, FusedDecoder(model)) == 2
    assert check(model, FusedDecoder(model)) == 2


def test_a_decoder_is_left_out_of_copies_and_pickles():
    _, decoder = decoded(small_model())
    assert copy.deepcopy({"decoder": decoder}) == {"decoder": None}
    assert pickle.loads(pickle.dumps(decoder)) is None


def test_weights_replaced_between_two_tokens_of_generate_decode_the_next():
    tokens = []
    for training in (False, True):
        model = small_model().train(training)
        steps = generate(model, torch.tensor([prompt(6)]), 12, temperature=0)
        out = [next(steps) for _ in range(5)]
        weight = model.layers[0].mixer.q_proj.weight
        model.layers[0].mixer.q_proj.weight = nn.Parameter(weight.detach() * -1)
        tokens.append(torch.stack([*out, *steps]))
    assert torch.equal(*tokens)


def test_weights_do_not_move_while_another_call_reads_them():
    model = small_model()
    decoder, place = FusedDecoder(model), model.layers[0].mixer.q_proj.weight.data_ptr()
    entered, leave = threading.Event(), threading.Event()

    def read():
        with running(model):
            entered.set()
            leave.wait()

    reader = threading.Thread(target=read)
    reader.start()
    entered.wait()
    with running(model):
        assert check(model, decoder) == 0
    assert model.layers[0].mixer.q_proj.weight.data_ptr() == place
    leave.set()
    reader.join()
    with running(model):
        assert check(model, decoder) == 2


@pytest.mark.parametrize("width", [160, 61])
def test_products_round_all_rows_alike_and_are_right(width):
    linear = nn.Linear(96, width)
    weight = pack([linear])
    assert isinstance(weight, DecodeWeight)
    for rows in (1, 2, 4, 8, BLOCK_PRODUCT_ROWS, BLOCK_PRODUCT_ROWS + 4, 64):
        x = torch.randn(1, 96).expand(rows, -1).contiguous()
        out = decode_linear(x, weight)
        torch.testing.assert_close(out, linear(x).detach())
        assert (out == out[0]).all()
