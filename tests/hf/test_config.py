"""`RetNetConfig`: transformers' names say what `model_config` says, whoever sets them and wherever they are read."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments

import retnet.hf  # noqa: F401 (registers)
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_config, load_model, save_model
from retnet.models.hf import RetNetConfig, RetNetForCausalLM
from retnet.models.hf.tokenizer import byte_tokenizer
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import ALIBI, MAMBA1, PAPER, STACKS, hf_model, random_ids, small_config, small_model

CHANGES = {
    "vocab_size": (70, "vocab_size", 70),
    "hidden_size": (48, "d_model", 48),
    "tie_word_embeddings": (True, "tie_embeddings", True),
    "initializer_range": (0.1, "init_std", 0.1),
    "num_hidden_layers": (1, "layers", (PAPER,)),
    "dtype": (torch.bfloat16, "dtype", "bfloat16"),
    "bos_token_id": (5, "bos_token_id", 5),
    "eos_token_id": ([6, 7], "eos_token_id", (6, 7)),
    "pad_token_id": (8, "pad_token_id", 8),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("way", ["given", "set", "updated", "on loading", "by hand in config.json"])
def test_a_field_beside_model_config_changes_it(tmp_path, name, way):
    given, field, expected = CHANGES[name]
    core = small_config("retention", eos_token_id=1)
    config = RetNetConfig.of(core)
    if way == "given":
        config = RetNetConfig(model_config=core.to_dict(), **{name: given})
    elif way == "set":
        setattr(config, name, given)
    elif way == "updated":
        config.update({name: given})
    else:
        config.save_pretrained(tmp_path)
        if way == "on loading":
            config = AutoConfig.from_pretrained(tmp_path, **{name: given})
        else:
            file = tmp_path / "config.json"
            plain = str(given).removeprefix("torch.") if name == "dtype" else given
            file.write_text(json.dumps(json.loads(file.read_text()) | {name: plain}))
            config = AutoConfig.from_pretrained(tmp_path)
            assert load_config(tmp_path) == config.core
    assert getattr(config, name) == given
    assert config.core == replace(core, **{field: expected})
    RetNetForCausalLM(config)


@pytest.mark.parametrize("name", CHANGES)
def test_config_json_says_everything_once_whoever_wrote_it(tmp_path, name):
    given, field, expected = CHANGES[name]
    config = RetNetConfig.of(small_config("retention"))
    setattr(config, name, given)
    config.save_pretrained(tmp_path / "transformers")
    model = RetNetForCausalLM(config)
    save_model(model.model, tmp_path / "native")
    written = [json.loads((tmp_path / w / "config.json").read_text()) for w in ("transformers", "native")]
    for data in written:
        assert data[name] == (expected if name == "dtype" else given)
        inner = RetNetConfig(model_config=data["model_config"]).core
        assert getattr(inner, field) == expected
    assert load_config(tmp_path / "transformers") == load_config(tmp_path / "native") == config.core


def test_a_token_id_that_is_taken_away_stays_away(tmp_path):
    model = hf_model(eos_token_id=3)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    assert load_config(tmp_path).eos_token_id is None
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id is None


def test_the_fields_that_libraries_read_are_in_to_dict():
    data = RetNetConfig.of(small_config("hybrid", tie_embeddings=True, eos_token_id=(3, 4))).to_dict()
    expected = {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": len(STACKS["hybrid"]), "num_attention_heads": 2,
        "eos_token_id": [3, 4],
        "tie_word_embeddings": True, "use_cache": True, "initializer_range": 0.02, "model_type": "retnet",
    }  # fmt: skip
    assert {name: data.get(name) for name in expected} == expected


def test_converting_to_a_dtype_and_saving_leaves_one_dtype_in_config_json(tmp_path):
    hf_model().to(torch.bfloat16).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["dtype"] == data["model_config"]["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == again.model.config.torch_dtype == load_model(tmp_path).config.torch_dtype == torch.bfloat16


def test_fewer_layers_on_loading_are_the_first_ones(tmp_path):
    model = hf_model("hybrid")
    model.save_pretrained(tmp_path)
    first, report = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2, output_loading_info=True)
    assert (len(first.model.layers), report["missing_keys"]) == (2, set())
    others = tuple(f"model.layers.{i}." for i in range(2, len(STACKS["hybrid"])))
    assert all(name.startswith(others) for name in report["unexpected_keys"])
    short = small_model(replace(model.model.config, layers=model.model.config.layers[:2]).layers, vocab_size=257)
    short.load_state_dict({k.removeprefix("model."): v for k, v in first.state_dict().items()})
    ids = random_ids(1, 6)
    assert torch.equal(first(ids).logits, short(ids).logits)


def test_more_layers_are_made_only_where_all_are_equal():
    config = RetNetConfig.of(small_config([PAPER, PAPER]))
    config.num_hidden_layers = 3
    assert config.core.layers == (PAPER,) * 3
    config = RetNetConfig.of(small_config([PAPER, ALIBI]))
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="num_hidden_layers is 3; accepted: 1 to 2, because the layers differ"):
        _ = config.core


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("vocab_size", "61", "an integer"),
        ("hidden_size", 2.5, "an integer"),
        ("hidden_size", True, "an integer"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("tie_word_embeddings", 1, "true or false"),
        ("initializer_range", "small", "a number"),
        ("num_hidden_layers", 0, "1 to"),
        ("num_hidden_layers", 10**9, "1 to"),
        ("num_hidden_layers", "2", "an integer"),
        ("num_attention_heads", 4, "2, as each layer's mixer gives its own"),
        ("dtype", "int8", "float32"),
    ],
)
def test_a_wrong_value_beside_model_config_is_named(tmp_path, name, value, accepted):
    core = small_config("retention")
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; accepted: {accepted}"):
        RetNetConfig(model_config=core.to_dict(), **{name: value})
    save_model(small_model("retention"), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {name} is {value!r}; accepted: {accepted}"):
        load_config(tmp_path)


def test_a_new_model_config_sets_the_fields_beside_it():
    config = RetNetConfig.of(small_config("retention"))
    config.model_config = small_config("hybrid", vocab_size=70, eos_token_id=9).to_dict()
    assert (config.vocab_size, config.num_hidden_layers, config.eos_token_id) == (70, len(STACKS["hybrid"]), 9)
    assert config.core == small_config("hybrid", vocab_size=70, eos_token_id=9)


def test_a_configuration_is_copied_pickled_and_compared():
    config = RetNetConfig.of(small_config("hybrid"))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert "RetNetConfig" in repr(config)
    assert RetNetConfig.of(small_config("retention")) != config


def test_a_stack_without_heads_names_none():
    assert RetNetConfig.of(small_config([MAMBA1])).num_attention_heads is None


def test_a_vocabulary_smaller_than_a_token_id_can_be_asked_for(tmp_path):
    model = hf_model(eos_token_id=3)
    with pytest.warns(UserWarning, match="bos_token_id is 256, beyond the vocabulary of 100"):
        model.resize_token_embeddings(100)
    assert (model.model.config.vocab_size, model.config.vocab_size) == (100, 100)
    assert (model.model.config.bos_token_id, model.model.config.eos_token_id) == (None, 3)


def test_the_ids_that_trainer_takes_from_the_tokenizer_are_those_of_the_saved_model(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "~"
    model = hf_model(eos_token_id=3, init="normal")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    features = [{"input_ids": [256, 97, 98, 126], "labels": [256, 97, 98, 126]}] * 2
    trainer = Trainer(model, arguments, train_dataset=features, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert 126 in load_config(tmp_path / "model").eos_token_ids
    data = json.loads((tmp_path / "model" / "config.json").read_text())
    assert data["eos_token_id"] == data["model_config"]["eos_token_id"]


def test_the_engine_and_every_writer_end_texts_where_generate_does(tmp_path):
    """Ends that are only in the generation configuration: set, changed in place, or loaded from its file."""
    model = hf_model()
    prompt = [256, 97, 98]
    free = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    end = free[4]
    expected = free[: free.index(end) + 1]

    def generated(inner):
        engine = Engine(inner, num_slots=1)
        generation = engine.submit(Request(prompt, 12, Sampling(temperature=0)))
        engine.run()
        return list(generation.tokens)

    assert generated(model.model) == free
    model.generation_config.eos_token_id = [end]
    assert model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, 3:].tolist() == expected
    assert generated(model.model) == expected
    save_model(model.model, tmp_path / "inner")
    model.save_pretrained(tmp_path / "outer")
    (tmp_path / "outer" / "config.json").write_text(RetNetConfig.of(model.model.config).to_json_string())
    loaded = RetNetForCausalLM.from_pretrained(tmp_path / "outer")
    assert generated(loaded.model) == generated(load_model(tmp_path / "inner")) == expected
    again = RetNetForCausalLM.wrap(loaded.model)
    assert again.generation_config.eos_token_id == [end]
    assert generated(copy.deepcopy(again).model) == expected
    loaded.generation_config = GenerationConfig(bos_token_id=256)
    assert generated(loaded.model) == free


def test_initialising_a_model_that_has_weights_changes_none():
    model = hf_model()
    before = {name: x.clone() for name, x in model.named_parameters()}
    model.init_weights()
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


@pytest.mark.parametrize("ids", [torch.arange(3), [[1, 2]], torch.zeros(1, 2, 3, dtype=torch.long)])
def test_ids_that_are_no_rows_of_tokens_are_refused_with_what_is_accepted(ids):
    with pytest.raises(ValueError, match=r"input_ids is of (shape|type) .*; accepted: a tensor \[B, T\]"):
        hf_model()(input_ids=ids)
