"""A whole run through the Trainer, small: what it writes, what it repeats, what it refuses."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from retnet.data import PackedDataset, find_documents, split_documents
from retnet.models.directory import load_model
from retnet.models.hf import RetNetForCausalLM
from retnet.train.recipe import load_recipe
from retnet.train.run import PackedTrainer, train


def recipe_for(byte_model, text_folder, output, **settings):
    defaults = {
        "length": 48,
        "valid_fraction": 0.2,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_strategy": "no",
        "output_dir": output,
    }
    words = [f"{key}={value}" for key, value in (defaults | settings).items()]
    return load_recipe(None, words, data=str(text_folder), model=str(byte_model))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def test_a_run_learns_and_leaves_a_model_a_log_and_a_curve(byte_model, text_folder, tmp_path, console):
    summary = train(recipe_for(byte_model, text_folder, tmp_path / "out"), console)
    assert (summary.steps, summary.tokens) == (8, 8 * 4 * 48)
    record = json.loads((tmp_path / "out/training.json").read_text())
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert losses[-1] < losses[0] < 1.05 * math.log(257)
    assert summary.valid_bits_per_byte == record["summary"]["valid_bits_per_byte"]
    assert (tmp_path / "out/loss_curve.png").read_bytes().startswith(b"\x89PNG")
    trained, start = load_model(tmp_path / "out"), load_model(byte_model)
    assert not torch.equal(trained.embedding.weight, start.embedding.weight)
    text = console.file.getvalue()
    assert "bits per byte" in text
    assert "tokens/s" in text
    assert "s left" in text


def test_the_same_run_twice_gives_the_same_bits(byte_model, text_folder, tmp_path, console):
    for name in ("a", "b"):
        train(recipe_for(byte_model, text_folder, tmp_path / name, do_eval=False), console)
    first, second = (load_model(tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_not_finite_ends_the_run_with_what_helps(byte_model, text_folder, tmp_path, console):
    recipe = recipe_for(byte_model, text_folder, tmp_path, learning_rate=1e30, max_grad_norm=0, logging_steps=1)
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at step \d+; a lower learning_rate"):
        train(recipe, console)


def test_a_model_that_cannot_read_bytes_is_refused(text_folder, tmp_path, console):
    from retnet.models.directory import save_model
    from retnet.models.lm import LanguageModel
    from retnet.models.presets import retnet_config

    save_model(LanguageModel(retnet_config("other", 1, 32, 2, vocab_size=100)), tmp_path / "other")
    with pytest.raises(ValueError, match="vocabulary of 100; bytes and the document start need 257"):
        train(recipe_for(tmp_path / "other", text_folder, tmp_path / "out"), console)


def test_weight_decay_leaves_norms_and_decays_alone(byte_model):
    from dataclasses import replace

    from retnet.models.hf import RetNetConfig
    from retnet.models.presets import retnet_config

    config = retnet_config("decays", 1, 32, 2, vocab_size=257)
    layers = [
        replace(config.layers[0], mixer=replace(config.layers[0].mixer, head_norm_affine="per_head", **options))
        for options in ({"learnable_decay": True}, {"decay": "gated"})
    ]
    model = RetNetForCausalLM(RetNetConfig.of(replace(config, layers=tuple(layers))))
    decayed = set(PackedTrainer.get_decay_parameter_names(None, model))
    spared = {name for name, _ in model.named_parameters()} - decayed
    assert {name.split(".")[-1] for name in decayed} == {"weight"}
    assert any(name.endswith("log_rate") for name in spared)
    assert any("decay_proj" in name for name in spared)
    assert any("head_norm" in name for name in spared)
    assert any("q_proj" in name for name in decayed)


def test_a_token_of_one_document_changes_no_loss_of_the_others(byte_model, text_folder):
    """Through packing and the model's face, as in training."""
    rows = PackedDataset(split_documents(find_documents(text_folder), 0.2).train, 200, seed=None)
    batch = torch.utils.data.default_collate([rows[0], rows[1]])
    model = RetNetForCausalLM.from_pretrained(byte_model).eval()
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    changed = {key: value.clone() for key, value in batch.items()}
    victim = starts[1] - 1  # the last token of the first document
    changed["input_ids"].view(-1)[victim] = (changed["input_ids"].view(-1)[victim] + 1) % 256
    with torch.no_grad():
        before, after = (
            model(input_ids=b["input_ids"], position_ids=b["position_ids"]).logits.flatten(0, 1)
            for b in (batch, changed)
        )
    assert not torch.equal(before[victim], after[victim])
    others = torch.arange(len(before)) != victim
    assert torch.equal(before[others], after[others])
