"""Small whole runs: their files, their reproducibility, and what is refused."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import Trainer

from retnet.data import PackedDataset, open_corpus
from retnet.models.directory import load_model, save_model
from retnet.stack.resolve import resolve_config
from retnet.train.inputs import _check_same_tokens, _check_vocabulary, initial_model
from retnet.train.losses import NonFiniteLoss
from retnet.train.recipe import load_recipe
from retnet.train.run import train
from retnet.train.throughput import Meter
from retnet.train.trainer import PackedTrainer
from tests.paths import ROOT
from tests.small_models import PAPER, hf_model, small_model

from .conftest import losses, recipe_for, weights

STACK = str(ROOT / "recipes" / "llama-125m.yml")
QUICK = {"max_steps": 8, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
ONE_BATCH = {"max_steps": 3, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}


def test_a_run_learns_and_writes_a_model_a_log_a_curve_and_samples(byte_model, text_folder, tmp_path, console, curve):
    settings = QUICK | {"do_eval": True, "num_samples": 2, "logging_steps": 4}
    summary = train(recipe_for(byte_model, text_folder, tmp_path / "out", **settings), console)
    assert (summary.steps, summary.tokens) == (8, 8 * 4 * 48)
    record = json.loads((tmp_path / "out/training.json").read_text())
    values = list(losses(tmp_path / "out").values())
    assert values[-1] < values[0] < 1.05 * math.log(257)
    assert summary.valid_bits_per_byte == record["summary"]["valid_bits_per_byte"]
    assert (tmp_path / "out/loss_curve.png").read_bytes().startswith(b"\x89PNG")
    trained, start = load_model(tmp_path / "out"), load_model(byte_model)
    assert not torch.equal(trained.embedding.weight, start.embedding.weight)
    text = console.file.getvalue()
    for shown in ("bits per byte", "tokens/s", "MFU", "waiting for data", "iB", "s left", "perplexity"):
        assert shown in text
    assert (tmp_path / "out/samples.txt").read_text().count("\n--- ") == 1  # the second of two
    report = (tmp_path / "out/report.html").read_text()
    assert f"report: {tmp_path / 'out/report.html'}" in text
    for shown in ("finished", "8 of 8", f"{summary.valid_bits_per_byte:.4f}", "fingerprint", torch.__version__):
        assert shown in report
    assert report.count("<pre dir") == 2
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["RetNetForCausalLM"]


def test_a_saved_model_loads_with_its_tokenizer_in_transformers(byte_model, text_folder, tmp_path, console):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import retnet.hf  # noqa: F401 (registers)

    train(recipe_for(byte_model, text_folder, tmp_path, **QUICK), console)
    tokenizer, model = (auto.from_pretrained(tmp_path) for auto in (AutoTokenizer, AutoModelForCausalLM))
    ids = tokenizer("decay", return_tensors="pt").input_ids
    assert ids.tolist() == [[256, *b"decay"]]
    assert model(ids).logits.shape == (1, 6, 257)


def test_validation_scores_every_byte_once(byte_model, text_folder, tmp_path, console):
    """Compared with each piece of each validation document on its own."""
    settings = QUICK | {"do_eval": True, "per_device_eval_batch_size": 3}
    summary = train(recipe_for(byte_model, text_folder, tmp_path, **settings), console)
    _, valid = open_corpus(text_folder).split(0.2)
    rows, model, nats, count = PackedDataset(valid, 48, None), load_model(tmp_path), 0.0, 0
    for row in (rows[i] for i in range(len(rows))):
        bounds = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), 48]
        for begin, end in pairwise(bounds):
            targets = row["shift_labels"][begin:end]
            log_p = model(row["input_ids"][None, begin:end]).logits[0].log_softmax(-1)
            kept = targets != -100
            nats -= log_p[kept].gather(1, targets[kept, None]).sum().item()
            count += int(kept.sum())
    assert count == valid.num_bytes == summary.valid_bytes
    assert summary.valid_loss == pytest.approx(nats / count, rel=1e-5)
    assert summary.valid_perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert summary.valid_bits_per_byte == pytest.approx(nats / count / math.log(2), rel=1e-5)


def test_two_equal_runs_give_equal_bits(dropout_model, text_folder, tmp_path, console):
    for name in ("a", "b"):
        train(recipe_for(dropout_model, text_folder, tmp_path / name, **QUICK), console)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.fixture(scope="module")
def in_one_batch(byte_model, shared_text_folder, tmp_path_factory):
    """The losses of a run of whole batches."""
    output = tmp_path_factory.mktemp("runs") / "one batch"
    train(recipe_for(byte_model, shared_text_folder, output, **ONE_BATCH), Console(quiet=True))
    return losses(output)


@pytest.mark.parametrize(
    "changed",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"recompute": "light"},
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, id="torch_compile", marks=pytest.mark.slow
        ),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": True},
            id="torch_compile, recomputed",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager", "recompute": "medium"},
            id="torch_compile, partly recomputed",
            marks=pytest.mark.slow,
        ),
        pytest.param({"recompute": "layer", "offload": True}, id="inputs on the host", marks=pytest.mark.slow),
        {"dataloader_num_workers": 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_losses_do_not_depend_on_how_a_step_is_computed(
    byte_model, text_folder, tmp_path, console, in_one_batch, changed
):
    """Rows have unequal numbers of targets, so a mean of means would differ."""
    train(recipe_for(byte_model, text_folder, tmp_path, **ONE_BATCH | changed), console)
    first, second = in_one_batch, losses(tmp_path)
    assert first.keys() == second.keys() == {1, 2, 3}
    assert [second[step] for step in second] == pytest.approx([first[step] for step in first], rel=2e-5)


def test_the_time_of_validation_and_checkpoints_is_not_counted_in_the_throughput(
    byte_model, text_folder, tmp_path, console, monkeypatch
):
    calls = []
    monkeypatch.setattr(Meter, "pause", lambda self, seconds: calls.append(seconds))
    monkeypatch.setattr(Meter, "restart", lambda self: calls.append("restart"))
    settings = QUICK | {
        "do_eval": True,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 8,
    }
    train(recipe_for(byte_model, text_folder, tmp_path, **settings), console)
    assert calls[0] == "restart"
    assert len(calls) == 1 + 2 + 1  # validation at steps 4 and 8; a checkpoint at step 8
    assert min(calls[1:]) > 0


def test_bfloat16_trains_float32_weights(byte_model, text_folder, tmp_path, console):
    train(recipe_for(byte_model, text_folder, tmp_path / "a", **QUICK), console)
    train(recipe_for(byte_model, text_folder, tmp_path / "b", **QUICK, bf16=True), console)
    assert load_model(tmp_path / "b").embedding.weight.dtype == torch.float32
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert list(second.values()) == pytest.approx(list(first.values()), rel=0.02)
    assert first != second


def test_corpora_are_mixed_and_validated_by_name(byte_model, text_folder, tmp_path, console):
    other = tmp_path / "others"
    other.mkdir()
    for i in range(8):
        (other / f"{i}.txt").write_text("numbers 1 2 3 4 5 6 7 8 9 " * (i + 3))
    mixed = f"{{{text_folder}: 3, {other}: 1}}"
    settings = QUICK | {"do_eval": True, "eval_strategy": "steps", "eval_steps": 4}
    recipe = recipe_for(byte_model, mixed, tmp_path / "out", **settings)
    assert recipe.weights == {str(text_folder): 3.0, str(other): 1.0}
    train(recipe, console)
    log = json.loads((tmp_path / "out/training.json").read_text())["log"]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8]
    assert all(f"eval_{name}_bits_per_byte" in evaluations[0] for name in (text_folder, other))


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1}, {"carry_state": True}], ids=str)
def test_validation_does_not_change_training(dropout_model, text_folder, tmp_path, console, settings):
    settings = QUICK | {"max_steps": 4} | settings
    train(recipe_for(dropout_model, text_folder, tmp_path / "a", **settings), console)
    validating = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "do_eval": True}
    if "carry_state" not in settings:  # which needs every row
        validating["valid_rows"] = 20
    train(recipe_for(dropout_model, text_folder, tmp_path / "b", **settings, **validating), console)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


def test_validation_draws_no_random_number_of_training_whatever_the_model_does(
    dropout_model, text_folder, tmp_path, console, monkeypatch
):
    original = PackedTrainer._score

    def score(self, rows):
        torch.rand(3)
        return original(self, rows)

    settings = QUICK | {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "valid_rows": 20}
    train(recipe_for(dropout_model, text_folder, tmp_path / "a", **settings), console)
    monkeypatch.setattr(PackedTrainer, "_score", score)
    train(recipe_for(dropout_model, text_folder, tmp_path / "b", **settings), console)
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 3}, [3]),
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 3]),
        ({"eval_strategy": "epoch"}, [3]),
        ({}, [3]),
    ],
    ids=str,
)
def test_the_last_step_is_validated_once(byte_model, text_folder, tmp_path, console, settings, steps):
    summary = train(
        recipe_for(
            byte_model,
            text_folder,
            tmp_path,
            **QUICK | settings | {"max_steps": 3, "do_eval": True, "valid_rows": 20},
        ),
        console,
    )
    log = json.loads((tmp_path / "training.json").read_text())["log"]
    validations = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert [entry["step"] for entry in log if "eval_loss" in entry] == steps
    assert summary.valid_loss == validations[3]


@pytest.mark.parametrize("place", ["loss", "weights"])
def test_a_loss_or_weight_that_is_not_finite_stops_the_run_with_its_step_documents_and_checkpoint(
    byte_model, text_folder, tmp_path, console, monkeypatch, place
):
    """The loss of a step, or a gradient that only makes the weights not finite."""
    original = PackedTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 5:
            next(self.model.parameters()).grad.fill_(math.nan)
        return loss

    originals_loss = Trainer.compute_loss

    def trainers_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = originals_loss(self, model, inputs, True, num_items_in_batch)
        if self.state.global_step == 5:
            loss = loss * math.nan
        return (loss, outputs) if return_outputs else loss

    if place == "loss":
        monkeypatch.setattr(Trainer, "compute_loss", trainers_loss)
    else:
        monkeypatch.setattr(PackedTrainer, "training_step", training_step)
    recipe = recipe_for(
        byte_model, text_folder, tmp_path, **QUICK, save_strategy="steps", save_steps=2, max_grad_norm=0
    )
    with pytest.raises(NonFiniteLoss) as error:
        train(recipe, console)
    message = str(error.value)
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-4'}" in message
    assert "lower learning_rate (now 0.01)" in message
    if place == "loss":
        assert "loss is nan at step 6, trained on" in message
        assert all(str(text_folder) in document for document in error.value.documents)
        assert len(error.value.documents) >= 4
    else:
        assert "weights are not finite after step 6" in message


def test_a_far_too_high_learning_rate_stops_the_run(byte_model, text_folder, tmp_path, console):
    recipe = recipe_for(byte_model, text_folder, tmp_path, **QUICK, learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(NonFiniteLoss, match=r"loss is (nan|inf) at step \d+, trained on .*There is no checkpoint"):
        train(recipe, console)


def test_weights_that_are_not_finite_are_not_saved(byte_model, text_folder, tmp_path, console, monkeypatch):
    """After the last step, no loss and no checkpoint checks the weights."""
    original = PackedTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step == self.state.max_steps - 1:
            next(self.model.parameters()).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(PackedTrainer, "training_step", training_step)
    with pytest.raises(NonFiniteLoss, match="weights are not finite after step"):
        train(recipe_for(byte_model, text_folder, tmp_path, **QUICK, max_grad_norm=0), console)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_validation_loss_that_is_not_finite_stops_the_run(byte_model, text_folder, tmp_path, console, monkeypatch):
    monkeypatch.setattr(PackedTrainer, "_score", lambda self, rows: torch.tensor([math.nan, 1.0]))
    with pytest.raises(NonFiniteLoss, match=r"the validation loss is not finite after step \d+"):
        train(recipe_for(byte_model, text_folder, tmp_path, **{**QUICK, "do_eval": True}), console)


def test_validation_in_other_tokens_is_refused(text_folder):
    train_corpus = open_corpus(str(text_folder))
    other = SimpleNamespace(name="v", tokenizer_id="0123456789abcdef", vocab_size=50257, document_start=50256)
    message = r"valid v is of tokenizer 0123456789ab \(50257 tokens, 50256 before a document\); accepted: .* bytes"
    with pytest.raises(ValueError, match=message):
        _check_same_tokens(train_corpus, other)


def test_further_training_accepts_only_the_models_own_tokenizer(byte_model, text_folder, tmp_path, console):
    train(recipe_for(byte_model, text_folder, tmp_path / "first", **QUICK), console)
    file = tmp_path / "first" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    renamed = next(iter(tokenizer["model"]["vocab"]))
    tokenizer["model"]["vocab"]["another"] = tokenizer["model"]["vocab"].pop(renamed)
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"reads the \d+ tokens of its tokenizer.json, and .* holds others"):
        train(recipe_for(tmp_path / "first", text_folder, tmp_path / "second", **QUICK), console)


def test_the_seed_determines_the_weights_of_a_preset(text_folder, tmp_path):
    recipe, corpus = recipe_for("retnet-tiny", text_folder, tmp_path), open_corpus(str(text_folder))
    one, same, other = (initial_model(recipe, corpus, seed).model.embedding.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_model_that_cannot_read_the_tokens_is_refused(text_folder, tmp_path, console):
    save_model(small_model(vocab_size=100), tmp_path / "other")
    with pytest.raises(ValueError, match=r"vocabulary of 100; the tokens of .* need 257"):
        train(recipe_for(tmp_path / "other", text_folder, tmp_path / "out"), console)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "message"),
    [
        ({"vocab_size": 320}, None, "vocabulary of 320, and .* is read as bytes, 257 tokens; accepted: .*--tokenizer"),
        ({"vocab_size": 257}, None, None),
        ({"vocab_size": 320, "bos_token_id": 256}, None, None),
        ({"vocab_size": 320}, 0, None),
        ({"vocab_size": 320, "bos_token_id": 0}, 0, None),
        ({"vocab_size": 320, "bos_token_id": 256}, 0, "is a model of bytes, and .* holds 300 tokens"),
        ({"vocab_size": 299}, 0, "vocabulary of 299; the tokens of .* need 300"),
    ],
    ids=str,
)
def test_tokens_and_vocabulary_fit_or_are_refused_with_what_to_do(text_folder, tmp_path, vocabulary, tokens, message):
    """tokens: None for bytes, otherwise the document start of a tokenizer with 300 tokens."""
    save_model(small_model(**vocabulary), tmp_path / "model")
    corpus = open_corpus(text_folder)
    if tokens is not None:
        corpus.tokenizer_id, corpus.vocab_size, corpus.document_start = "0123", 300, tokens
    recipe = recipe_for(tmp_path / "model", text_folder, tmp_path / "out")
    refused = nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with refused:
        initial_model(recipe, corpus, 0)


@pytest.mark.parametrize("model", ["retnet-125m", STACK])
def test_a_preset_or_stack_with_gpt2s_vocabulary_refuses_text(text_folder, model):
    recipe, corpus = load_recipe(None, [f"model={model}", f"data={text_folder}"]), open_corpus(text_folder)
    with pytest.raises(
        ValueError, match=r"vocabulary of 50304, and .*such as retnet-tiny or a stack with vocab_size: 257"
    ):
        _check_vocabulary(recipe.model, resolve_config(recipe.model), corpus)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": "{num_decay_steps: many}"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": "{min_lr: low}"},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "{num_cycles: many}"},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": "{lr_end: 3, power: 2}"},
        {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": "{unknown: 1}"},
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_made_is_refused_before_the_first_step(
    byte_model, text_folder, tmp_path, console, settings
):
    with pytest.raises(
        ValueError, match=f"lr_scheduler_type is '{settings['lr_scheduler_type']}' with .*cannot be made"
    ):
        train(recipe_for(byte_model, text_folder, tmp_path, **QUICK | settings), console)
    assert "step 1/" not in console.file.getvalue()


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_settings(
    byte_model, text_folder, tmp_path, console, monkeypatch
):
    class ConnectError(Exception):
        """Of the hub's HTTP client; no OSError."""

    def create(trainer, *args, **kwargs):
        raise ConnectError("name not known")

    monkeypatch.setattr(Trainer, "init_hf_repo", create)
    with pytest.raises(ValueError, match="the Trainer does not accept these settings: name not known"):
        train(recipe_for(byte_model, text_folder, tmp_path, **QUICK, push_to_hub=True), console)


def test_weight_decay_leaves_norms_and_decays_alone():
    layers = [
        replace(PAPER, mixer=replace(PAPER.mixer, head_norm_affine="per_head", **options))
        for options in ({"learnable_decay": True}, {"decay": "gated"})
    ]
    model = hf_model(layers)
    decayed = set(PackedTrainer.get_decay_parameter_names(None, model))
    spared = {name for name, _ in model.named_parameters()} - decayed
    assert {name.split(".")[-1] for name in decayed} == {"weight"}
    assert any(name.endswith("log_rate") for name in spared)
    assert any("decay_proj" in name for name in spared)
    assert any("head_norm" in name for name in spared)
    assert any("q_proj" in name for name in decayed)


def test_a_saved_model_is_trained_further(byte_model, text_folder, tmp_path, console):
    train(recipe_for(byte_model, text_folder, tmp_path / "first", **QUICK), console)
    train(recipe_for(tmp_path / "first", text_folder, tmp_path / "second", **QUICK), console)
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1]


def test_validation_on_a_sample_of_rows_is_that_of_these_rows(byte_model, text_folder, tmp_path, console):
    settings = QUICK | {"max_steps": 2, "do_eval": True, "eval_strategy": "steps", "eval_steps": 1, "valid_rows": 3}
    summary = train(recipe_for(byte_model, text_folder, tmp_path / "out", **settings), console)
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert [entry["step"] for entry in record["log"] if "eval_bits_per_byte" in entry] == [1, 2]
    _, valid = open_corpus(text_folder).split(0.2)
    rows = PackedDataset(valid, 48, None)
    rows.sample(3)
    assert summary.valid_bytes == rows.num_bytes < valid.num_bytes
    batch = {key: torch.stack([rows[i][key] for i in range(3)]) for key in rows[0]}
    model = load_model(tmp_path / "out")
    with torch.no_grad():
        cut = [model.loss(batch["input_ids"][i : i + 1], batch["shift_labels"][i : i + 1],
                          cu_seqlens=_boundaries(batch["position_ids"][i])) for i in range(3)]  # fmt: skip
    targets = [(batch["shift_labels"][i] >= 0).sum() for i in range(3)]
    expected = sum(loss * count for loss, count in zip(cut, targets, strict=True)) / sum(targets)
    assert summary.valid_loss == pytest.approx(expected.item(), rel=1e-5)


def _boundaries(positions):
    starts = [i for i, position in enumerate(positions.tolist()) if position == 0]
    return torch.tensor([*starts, len(positions)])


def test_a_sample_of_rows_is_refused_where_states_are_carried_over(byte_model, text_folder, tmp_path, console):
    with pytest.raises(ValueError, match="valid_rows leaves rows out"):
        train(recipe_for(byte_model, text_folder, tmp_path, carry_state=True, valid_rows=3), console)


def test_a_model_of_an_earlier_run_is_not_replaced_unless_asked_for(byte_model, short_texts, tmp_path, console):
    """Without checkpoints nothing else says that a run was there."""
    output, settings = tmp_path / "out", QUICK | {"max_steps": 1, "warmup_steps": 0}
    train(recipe_for(byte_model, short_texts, output, **settings), console)
    before = weights(output)
    for more in ({}, {"resume_from_checkpoint": "auto"}):
        with pytest.raises(FileExistsError, match="accepted: another output_dir, or force=true to replace the model"):
            train(recipe_for(byte_model, short_texts, output, **settings, **more), console)
    assert weights(output) == before
    train(recipe_for(byte_model, short_texts, output, **{**settings, "learning_rate": 0.1, "force": True}), console)
    assert weights(output) != before
