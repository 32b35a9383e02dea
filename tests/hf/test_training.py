"""Losses, gradients and packs of the Hugging Face classes, alone and with transformers' Trainer and collators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import SequentialSampler
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from retnet.layers.recompute import Recompute
from retnet.models.hf.inputs import document_bounds, last_columns, without_first_labels
from tests.small_models import EXPERTS, GATED, HYENA, MAMBA1, MAMBA2, MTP, PAPER, WINDOW, hf_model

from .conftest import random_ids

IDS = random_ids(2, 40)
FEATURES = [{"input_ids": random_ids(1, length)[0].tolist()} for length in (9, 4, 12)]


def loss_and_gradient(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": torch.tensor(100)}, {"ignore_index": 97}])
def test_the_loss_without_logits_equals_the_one_with_them(extra):
    model, ids = hf_model().train(), random_ids(2, 9)
    assert model(ids, labels=ids).logits is not None
    model.config.loss_without_logits = True
    labels = ids.masked_fill(ids < 60, -100)
    fused, gradient = loss_and_gradient(model, input_ids=ids, labels=labels, **extra)
    plain, expected = loss_and_gradient(model, input_ids=ids, labels=labels, logits_to_keep=0, **extra)
    assert fused.logits is None
    assert plain.logits.shape == (2, 9, 257)
    torch.testing.assert_close(fused.loss, plain.loss)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert model.eval()(ids, labels=labels).logits is not None


def test_a_head_that_is_not_a_plain_linear_layer_runs_as_its_module():
    """An adapter on the head must not be skipped."""
    model, ids = hf_model().train(), random_ids(2, 9)

    class Shifted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.arange(self.out_features)

    head = Shifted(32, 257, bias=False)
    model.set_output_embeddings(head)
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_checkpointing_changes_no_gradient_and_uses_the_chosen_function(model):
    ids = random_ids(2, 9)
    model.train()
    _, expected = loss_and_gradient(model, input_ids=ids, labels=ids)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        assert model.model.checkpoint.keywords == {"use_reentrant": reentrant}
        recomputed = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda *_, calls=recomputed: calls.append(1))
        _, gradient = loss_and_gradient(model, input_ids=ids, labels=ids)
        hook.remove()
        assert len(recomputed) == 2
        torch.testing.assert_close(gradient, expected)
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("as_bounds", [False, True])
def test_a_flattened_batch_equals_its_documents_alone(model, as_bounds):
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=as_bounds, return_position_ids=not as_bounds)(FEATURES)
    assert ("cu_seq_lens_q" in batch) == as_bounds
    packed = model(**batch)
    nats, count, begin = 0.0, 0, 0
    for feature in FEATURES:
        ids = torch.tensor([feature["input_ids"]])
        alone = model(ids)
        end = begin + ids.shape[1]
        torch.testing.assert_close(packed.logits[0, begin:end], alone.logits[0], rtol=1e-4, atol=1e-4)
        nats += F.cross_entropy(alone.logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count, begin = count + ids.shape[1] - 1, end
    assert packed.loss.item() == pytest.approx(nats / count, rel=1e-4)


def test_left_padding_is_not_mistaken_for_packing(model):
    """transformers counts positions from each row's first real token and gives pads position 0."""
    ids = random_ids(2, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0, 3:], model(ids[:1, 3:]).logits[0], rtol=1e-4, atol=1e-4)


def test_logits_to_keep_selects_the_tokens(retnet_model):
    ids = random_ids(2, 6)
    logits = retnet_model(ids).logits
    torch.testing.assert_close(retnet_model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(retnet_model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])
    with pytest.raises(ValueError, match="logits_to_keep is 2 with labels"):
        retnet_model(ids, labels=ids, logits_to_keep=2)


def test_return_dict_false_returns_a_tuple(retnet_model):
    ids = random_ids(1, 4)
    loss, logits = retnet_model(ids, labels=ids, return_dict=False)
    assert (loss.shape, logits.shape) == ((), (1, 4, 257))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "one of input_ids and inputs_embeds"),
        ({"input_ids": random_ids(1, 3), "output_attentions": True}, "output_attentions is True; accepted: False"),
        ({"input_ids": random_ids(1, 3), "attention_mask": torch.ones(1, 2)}, r"attention_mask has shape \[1, 2\]"),
        (
            {"input_ids": random_ids(1, 3), "cu_seq_lens_q": torch.tensor([0, 2, 3]), "use_cache": True},
            "use_cache is True for packed documents",
        ),
    ],
)
def test_unsupported_inputs_are_refused(retnet_model, inputs, message):
    with pytest.raises(ValueError, match=message):
        retnet_model(**inputs)


def test_packs_do_not_continue_a_cache(retnet_model):
    cache = retnet_model(random_ids(1, 3)).past_key_values
    with pytest.raises(ValueError, match="filled cache"):
        retnet_model(random_ids(1, 3), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 1, 3]))


def test_a_mask_of_all_tokens_is_cut_to_the_last_columns():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    assert last_columns(mask, (2, 2)).tolist() == [[True, False], [True, True]]
    assert last_columns(torch.ones(2, 9), (2, 3)) is None
    assert last_columns(None, (2, 3)) is None


def test_first_labels_are_found_by_bounds_with_empty_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert document_bounds(positions).tolist() == [0, 3, 5, 6]
    labels = torch.arange(6)[None]
    assert without_first_labels(labels, torch.tensor([0, 3, 3, 5, 6, 6])).tolist() == [[-100, 1, 2, -100, 4, -100]]


def test_gradient_checkpointing_is_the_level_layer():
    model = hf_model()
    model.model.recompute = Recompute("medium")
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.model.recompute == Recompute("layer")
    model.gradient_checkpointing_disable()
    assert model.model.recompute == Recompute()


@pytest.mark.parametrize("stack", ["both decays", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_the_trainer_trains_packed_rows_and_evaluates(tmp_path, stack):
    model = hf_model(stack, init="normal", init_std=0.05)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        learning_rate=3e-2, logging_steps=1, report_to=[], gradient_checkpointing=True, use_cpu=True, disable_tqdm=True,
        save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=FEATURES * 8, eval_dataset=FEATURES, data_collator=DataCollatorWithFlattening()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_router_losses_count_by_tokens_under_accumulation_and_not_in_evaluation(tmp_path, rows):
    experts = replace(PAPER, feed_forward=replace(EXPERTS, load_balance_coef=1.0, z_loss_coef=0.1))
    model, ids = hf_model([experts, experts]), random_ids(8, 12)
    parts = [model.model(part) for part in ids.split(rows)]
    logits, losses = torch.cat([part.logits for part in parts]), torch.stack([part.auxiliary_loss for part in parts])
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    features = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids.tolist()]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows, max_steps=1, logging_steps=1,
        learning_rate=0.0, report_to=[], save_strategy="no", use_cpu=True, per_device_eval_batch_size=rows,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=features, eval_dataset=features, data_collator=_stacked)
    trainer._get_train_sampler = lambda *_: SequentialSampler(features)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(nats + losses.mean().item(), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nats, rel=1e-4)


def _stacked(features):
    return {name: torch.tensor([row[name] for row in features]) for name in features[0]}


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("layer", [PAPER, GATED, WINDOW, MAMBA2, MAMBA1, HYENA, replace(PAPER, feed_forward=EXPERTS)])
def test_every_mixer_trains_under_autocast(layer, inside):
    """As `bf16=True` and `fp16=True` of the Trainer train: gradients differ by the rounding of the products alone."""
    model = hf_model([layer]).train()

    def gradients(autocast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}

    wanted, held = gradients(False), gradients(True)
    for name, x in wanted.items():
        assert (held[name] - x).norm() <= 0.1 * x.norm(), name


def test_a_loss_outside_the_model_finds_the_losses_of_routers_beside_the_logits():
    model = hf_model("experts").train()
    inside = model(input_ids=IDS, labels=IDS)
    outside = model(input_ids=IDS)
    nats = F.cross_entropy(outside.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert outside.aux_loss > 0
    assert (nats + outside.aux_loss).item() == pytest.approx(inside.loss.item(), rel=1e-6)
    assert inside.aux_loss.item() == pytest.approx(outside.aux_loss.item(), rel=1e-6)
    shared = model(input_ids=IDS, labels=IDS, num_items_in_batch=4 * IDS[:, 1:].numel())
    assert shared.aux_loss.item() == pytest.approx(inside.aux_loss.item() / 4, rel=1e-6)
    assert model.eval()(input_ids=IDS).aux_loss is None
    assert hf_model("hybrid").train()(input_ids=IDS, labels=IDS).aux_loss is None


def test_multi_token_prediction_joins_the_loss_of_training_alone_whatever_the_layout():
    model = hf_model(mtp=MTP).train()
    ids = IDS[:, :8]
    padded, mask = F.pad(ids, (0, 2), value=7), F.pad(torch.ones_like(ids), (0, 2))
    labels = padded.masked_fill(mask == 0, -100)
    plain = model(input_ids=ids, labels=ids)
    nats = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert (nats + plain.mtp_loss).item() == pytest.approx(plain.loss.item(), rel=1e-6)
    for inputs in (
        {"input_ids": padded, "attention_mask": mask, "labels": labels},
        {"input_ids": ids.reshape(1, -1), "labels": ids.reshape(1, -1),
         "position_ids": torch.arange(8).repeat(len(ids))[None]},
        {"inputs_embeds": model.model.embedding(ids), "labels": ids},
    ):  # fmt: skip
        assert model(**inputs).mtp_loss.item() == pytest.approx(plain.mtp_loss.item(), rel=1e-5)
    shared = model(input_ids=ids, labels=ids, num_items_in_batch=4 * ids[:, 1:].numel())
    assert shared.mtp_loss.item() == pytest.approx(plain.mtp_loss.item() / 4, rel=1e-6)
    assert model.eval()(input_ids=ids, labels=ids).mtp_loss is None
    without = hf_model(mtp=None)
    without.model.load_state_dict(model.model.state_dict(), strict=False)
    assert torch.equal(model(input_ids=ids).logits, without(input_ids=ids).logits)


def test_a_loss_outside_the_model_says_that_it_leaves_out_the_losses_of_routers_and_further_tokens(monkeypatch):
    said = []
    monkeypatch.setattr("retnet.models.hf.body.logger.warning_once", said.append)
    hf_model("hybrid").train()(input_ids=IDS, num_items_in_batch=9)
    hf_model("experts").eval()(input_ids=IDS, num_items_in_batch=9)
    hf_model("experts").train()(input_ids=IDS, labels=IDS, num_items_in_batch=9)
    assert not said
    with torch.no_grad():
        hf_model("experts").train().base_model(input_ids=IDS)
    assert not said
    hf_model("experts").train()(input_ids=IDS, num_items_in_batch=9)
    hf_model("experts").train().base_model(input_ids=IDS)
    hf_model(mtp=MTP).train()(input_ids=IDS, num_items_in_batch=9)
    assert len(said) == 3
    assert "lacks the losses of routers" in said[0]
    assert "aux_loss" in said[0]
    assert said[1] == said[0]
    assert "lacks the losses of multi-token prediction" in said[2]
