"""Behaviours of transformers' own models, checked on a tiny Llama and on ours with the same code.

The kinds are those of transformers' common model and generation tests: switches of `from_pretrained`, outputs by call
and by configuration, embeddings, saving, `generate`. `docs/reference/works_with.md` lists what is left out.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import retnet.hf  # noqa: F401 (registers)
from retnet.layers.hyper_connection import merge_streams
from retnet.models.hf import RetNetForCausalLM, RetNetModel
from tests.small_models import PAPER, hf_model

from .conftest import random_ids

IDS = random_ids(2, 6)
DEPTH, WIDTH, VOCAB = 3, 32, 257


def make(family: str, tied: bool = True) -> nn.Module:
    if family == "llama":
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": DEPTH}
        ids = {"bos_token_id": 256, "eos_token_id": None}
        return LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=2, tie_word_embeddings=tied)).eval()
    model = hf_model([PAPER] * DEPTH if family == "retnet" else "hybrid", tie_embeddings=tied)
    model.generation_config.pad_token_id = None
    return model


@pytest.fixture(scope="module", params=["llama", "retnet", "hybrid"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(family)
    make(family).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def untied(family, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(family)
    make(family, tied=False).save_pretrained(path)
    return path


@pytest.fixture
def model(directory) -> nn.Module:
    return load(directory)


def load(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def generate(model, ids=IDS, **options):
    return model.generate(ids, **{"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **options})


def depth(model) -> int:
    return model.config.num_hidden_layers


# Outputs


@pytest.mark.parametrize("way", ["call", "configuration", "loading"])
def test_no_cache_is_returned_where_it_is_switched_off(directory, way):
    model = load(directory, **({"use_cache": False} if way == "loading" else {}))
    if way == "configuration":
        model.config.use_cache = False
    options = {"use_cache": False} if way == "call" else {}
    assert model(IDS, **options).past_key_values is None
    assert model.base_model(IDS, **options).past_key_values is None
    assert model(IDS, use_cache=True).past_key_values is not None
    assert generate(model, **options).shape == (2, 9)


@pytest.mark.parametrize("way", ["call", "configuration", "loading"])
@pytest.mark.parametrize("training", [False, True])
def test_hidden_states_of_all_layers(directory, way, training):
    model = load(directory, **({"output_hidden_states": True} if way == "loading" else {})).train(training)
    if way == "configuration":
        model.config.output_hidden_states = True
    options = {"output_hidden_states": True} if way == "call" else {}
    states = model(IDS, **options, labels=IDS).hidden_states
    assert [tuple(x.shape) for x in states] == [(2, 6, WIDTH)] * (depth(model) + 1)
    torch.testing.assert_close(states[0], model.get_input_embeddings()(IDS))
    torch.testing.assert_close(states[-1], model.base_model(IDS).last_hidden_state)
    torch.testing.assert_close(model.get_output_embeddings()(states[-1]), model(IDS).logits)
    inner = model.base_model(IDS, **options).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(states, inner, strict=True))
    assert model(IDS, output_hidden_states=False).hidden_states is None


def test_gradients_are_kept_at_a_hidden_state(model):
    output = model(IDS, output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.logits[0, 3, 7].backward()
    # The next layer reads several residual streams, not their mean, which such a layer gives as its hidden state.
    means = [getattr(layer, "gives_streams", False) for layer in model.model.layers]
    found = [state.grad is not None and bool(state.grad.any()) for state in output.hidden_states[1:]]
    assert found == [not mean for mean in means]


def test_hidden_states_are_those_of_the_blocks(model):
    seen = []
    blocks = model.model.layers
    hooks = [block.register_forward_hook(lambda _, args, out: seen.append(out)) for block in blocks]
    states = model(IDS, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    outs = [merge_streams(out[0] if isinstance(out, tuple) else out, WIDTH) for out in seen]
    assert all(torch.equal(a, b) for a, b in zip(outs[:-1], states[1:-1], strict=True))


def test_a_tuple_is_returned_by_call(model):
    loss, logits = model(IDS, labels=IDS, return_dict=False, use_cache=False)
    assert (loss.shape, logits.shape) == ((), (2, 6, VOCAB))
    assert isinstance(model.base_model(IDS, return_dict=False), tuple)
    assert isinstance(model(IDS, return_dict=True), dict)


def test_the_base_model_is_a_module_with_the_last_hidden_state(model):
    base = model.base_model
    assert isinstance(base, nn.Module)
    assert base is model.base_model
    assert base is base.base_model or base.base_model is not model
    assert base.config is model.config
    assert model.get_decoder() is base
    hidden = base(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(IDS).logits)
    assert "base_model" not in {name for name, _ in model.named_modules()}
    base.train()
    assert base.layers.training if hasattr(base, "layers") else base.model.training


def test_the_base_model_can_be_saved_and_loaded(model, tmp_path):
    model.base_model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == set()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(IDS)[0], model.base_model(IDS)[0])


def test_logits_come_with_the_loss_in_training_and_have_gradients(model):
    output = model.train()(IDS, labels=IDS)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    (gradient,) = torch.autograd.grad(output.logits.square().sum(), [model.get_input_embeddings().weight])
    assert gradient.any()


@pytest.mark.parametrize("kept", [0, 1, 2, torch.tensor([1, 3])])
def test_logits_are_kept_as_asked(model, kept):
    part = slice(-kept, None) if isinstance(kept, int) else kept
    torch.testing.assert_close(model(IDS, logits_to_keep=kept).logits, model(IDS).logits[:, part])


def test_a_row_of_padding_alone_gives_finite_logits(model):
    assert model(IDS, attention_mask=torch.tensor([[0] * 6, [1] * 6])).logits.isfinite().all()


def test_one_of_ids_and_embeddings_is_needed(model):
    with pytest.raises(ValueError, match="one of input_ids"):
        model()
    with pytest.raises(ValueError, match="one of input_ids"):
        model(IDS, inputs_embeds=model.get_input_embeddings()(IDS))
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, model(IDS).logits)


# Loading and saving


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
def test_the_dtype_of_loading(directory, name, dtype):
    expected = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    model = load(directory, **{name: dtype})
    assert model.dtype == model.config.dtype == expected


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
        {"local_files_only": True},
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
    ],
    ids=str,
)
def test_switches_that_change_no_number(directory, model, options):
    other = load(directory, **options)
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits)
    assert torch.equal(generate(other), generate(model))


def test_an_attention_kernel_that_is_not_there_is_refused(directory):
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
        load(directory, attn_implementation="flash_attention_2")


def test_subfolders_and_variants(directory, model, tmp_path):
    shutil.copytree(directory, tmp_path / "whole" / "inside")
    assert torch.equal(load(tmp_path / "whole", subfolder="inside")(IDS).logits, model(IDS).logits)
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert (tmp_path / "variant" / "model.fp16.safetensors").exists()
    assert torch.equal(load(tmp_path / "variant", variant="fp16")(IDS).logits, model(IDS).logits)


def test_an_unknown_switch_of_loading_is_refused(directory):
    with pytest.raises(TypeError, match="num_hidden_layer"):
        load(directory, num_hidden_layer=1)


def test_a_width_that_is_not_the_checkpoints_is_refused_or_drawn_anew(directory):
    with pytest.raises(RuntimeError, match="mismatch"):
        load(directory, hidden_size=64)
    model, report = load(directory, hidden_size=64, ignore_mismatched_sizes=True, output_loading_info=True)
    assert report["mismatched_keys"]
    assert model.config.hidden_size == 64
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in model.parameters())
    assert model(IDS).logits.isfinite().all()


def test_untying_on_loading_copies_or_draws_as_transformers_does(directory, untied):
    model, report = load(directory, tie_word_embeddings=False, output_loading_info=True)
    assert not model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert len(report["missing_keys"]) == 1
    both = load(untied, tie_word_embeddings=True)  # transformers keeps two weights that differ
    assert torch.equal(both(IDS).logits, load(untied)(IDS).logits)


def test_a_head_that_is_untied_later_is_saved(model, tmp_path):
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(nn.Linear(WIDTH, VOCAB, bias=False))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not again.config.tie_word_embeddings


def test_given_state_dicts_are_loaded_and_saved(model, tmp_path):
    zeros = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    empty = type(model).from_pretrained(None, config=model.config, state_dict=zeros)
    assert not any(p.any() for p in empty.parameters())
    model.save_pretrained(tmp_path, state_dict=zeros)
    assert not any(p.any() for p in load(tmp_path).parameters())


def test_a_model_is_copied_and_pickled_with_its_base_model(model):
    expected = model(IDS).logits
    hidden = model.base_model(IDS).last_hidden_state
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(IDS).logits, expected)
        with torch.no_grad():
            other.get_input_embeddings().weight.zero_()
        assert not torch.equal(other.base_model(IDS).last_hidden_state, hidden)
    assert torch.equal(model.base_model(IDS).last_hidden_state, hidden)


def test_checkpointing_is_no_part_of_a_saved_model(model, tmp_path):
    model.train().gradient_checkpointing_enable()
    model.save_pretrained(tmp_path)
    assert not load(tmp_path).is_gradient_checkpointing


# Embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_resized_up_down_and_to_multiples(directory, untied, tied):
    model = load(directory if tied else untied)
    logits = model(IDS).logits
    model.resize_token_embeddings(300)
    torch.testing.assert_close(model(IDS).logits[..., :VOCAB], logits)
    model.resize_token_embeddings(310, mean_resizing=False)
    assert model.get_input_embeddings().weight[300:].std() < 0.1
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == model.get_output_embeddings().out_features == 320
    model.resize_token_embeddings(260)
    torch.testing.assert_close(model(IDS).logits[..., :VOCAB], logits)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert generate(model).shape == (2, 9)


def test_embeddings_are_set_through_the_model_or_its_base(untied):
    model = load(untied)
    for owner in (model, model.base_model):
        new = nn.Embedding(VOCAB, WIDTH)
        owner.set_input_embeddings(new)
        assert model.get_input_embeddings() is model.base_model.get_input_embeddings() is new
        torch.testing.assert_close(model(IDS).logits, model(inputs_embeds=new(IDS)).logits)


def test_inputs_get_gradients_for_adapters(model):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(IDS).logits.requires_grad


# Generation


@pytest.mark.parametrize("beams", [1, 2])
def test_everything_that_generate_can_return(model, beams):
    options = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "num_beams": beams}
    output = generate(model, return_dict_in_generate=True, **options)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == 3
    assert output.scores[0].shape == (2 * beams, VOCAB)
    for step, states in enumerate(output.hidden_states):
        assert [x.shape[1] for x in states] == [6 if step == 0 else 1] * (depth(model) + 1)
    whole = model(output.sequences[:, :-1], output_hidden_states=True).hidden_states
    if beams == 1:
        for layer, states in enumerate(output.hidden_states[2]):
            torch.testing.assert_close(states[:, 0], whole[layer][:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6]},
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"forced_eos_token_id": 9},
        {"min_new_tokens": 3, "eos_token_id": [4, 5]},
        {"exponential_decay_length_penalty": (1, 1.1), "eos_token_id": 4},
        {"max_time": 100.0},
        {"use_cache": False},
    ],
    ids="-".join,
)
def test_ways_to_generate(model, options):
    result = generate(model, **options)
    assert result.shape[1] == 9
    assert torch.equal(result[:, :6], IDS.repeat_interleave(len(result) // 2, 0))


def test_several_ends_each_stop_a_row(model):
    free = generate(model, max_new_tokens=8)[0, 6:].tolist()
    ends = [free[4], next(t for t in range(256) if t not in free)]
    for order in (ends, ends[::-1]):
        stopped = generate(model, IDS[:1], max_new_tokens=8, eos_token_id=order)[0, 6:].tolist()
        assert stopped == free[: free.index(ends[0]) + 1]


def test_a_list_of_ends_in_the_configuration_is_kept(model, tmp_path):
    model.config.eos_token_id = model.generation_config.eos_token_id = [4, 5]
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == [4, 5]
    assert load(tmp_path).generation_config.eos_token_id == [4, 5]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [4, 5]


def test_generation_starts_from_bos_without_a_prompt(model):
    assert generate(model, None)[0, 0] == 256


# Ours alone: the tiny Llama of the installed transformers fails here.


@pytest.mark.parametrize("way", ["configuration", "loading"])
def test_a_tuple_is_returned_where_the_configuration_says_so(saved, way):
    model = load(saved, **({"return_dict": False} if way == "loading" else {}))
    if way == "configuration":
        model.config.return_dict = False
    assert isinstance(model(IDS), tuple)
    assert isinstance(model.base_model(IDS), tuple)
    assert isinstance(model(IDS, return_dict=True), dict)
    assert generate(model).shape == (2, 9)


def test_single_hidden_states_are_selected(saved):
    model = load(saved)
    states = model(IDS, output_hidden_states=True).hidden_states
    count = len(states)
    for places in (0, -2, [1, -1], []):
        chosen = model(IDS, output_hidden_states=places).hidden_states
        wanted = {p % count for p in ([places] if isinstance(places, int) else places)}
        assert [x is not None for x in chosen] == [i in wanted for i in range(count)]
        assert all(x is None or torch.equal(x, states[i]) for i, x in enumerate(chosen))


def test_hidden_states_of_packed_documents_have_the_shape_of_the_rows(saved):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    states = load(saved)(IDS, position_ids=positions, output_hidden_states=True).hidden_states
    assert {tuple(x.shape) for x in states} == {(2, 6, WIDTH)}


@pytest.mark.parametrize("shape", [(2, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("stack", ["every mixer", "experts", "both decays"])
@pytest.mark.parametrize("training", [False, True])
def test_no_tokens_and_no_rows_give_empty_outputs(shape, stack, training):
    model, ids = hf_model(stack).train(training), torch.zeros(shape, dtype=torch.long)
    output = model(ids, output_hidden_states=True)
    assert output.logits.shape == (*shape, VOCAB)
    assert {tuple(x.shape) for x in output.hidden_states} == {(*shape, WIDTH)}
    assert model(inputs_embeds=torch.zeros(*shape, WIDTH)).logits.shape == (*shape, VOCAB)
    assert model(ids, attention_mask=torch.ones(shape)).logits.shape == (*shape, VOCAB)
    assert model.base_model(ids).last_hidden_state.shape == (*shape, WIDTH)
    assert model(ids, labels=ids).loss.shape == ()
    if shape[0]:
        cache = model(ids, use_cache=True).past_key_values if stack != "experts" else None
        more = model(IDS, past_key_values=cache)
        torch.testing.assert_close(more.logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_generating_from_nothing_says_what_is_accepted(saved, shape):
    with pytest.raises(
        ValueError, match=rf"input_ids has shape \[{shape[0]}, {shape[1]}\]; accepted: at least one row"
    ):
        generate(load(saved), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    "foreign",
    [
        {"hidden_size": 2048, "num_heads": 8, "expand_v": 2},
        {
            "decoder_embed_dim": 512,
            "decoder_layers": 6,
            "auto_map": {"AutoConfig": "configuration_retnet.RetNetConfig"},
        },
    ],
    ids=["fla", "syncdoth"],
)
def test_a_retnet_of_another_library_is_sent_to_the_converter(tmp_path, foreign):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "retnet", **foreign}))
    for read in (AutoModelForCausalLM, AutoModel, AutoConfig, RetNetForCausalLM, RetNetModel):
        with pytest.raises(ValueError, match="retnet convert"):
            read.from_pretrained(tmp_path, **({"trust_remote_code": False} if "Auto" in read.__name__ else {}))
