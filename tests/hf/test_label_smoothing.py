"""Label smoothing in transformers' Trainer: the smoothed labels are shifted, as for every causal model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments, pipeline
from transformers.models.auto import modeling_auto

from retnet.models.hf import RetNetForCausalLM
from retnet.models.hf.tokenizer import byte_tokenizer
from tests.small_models import hf_model

from .conftest import random_ids

EPSILON = 0.3
IDS = random_ids(2, 9)
LABELS = IDS.masked_fill(IDS < 60, -100)


class Subclass(RetNetForCausalLM):
    """A user's model."""


def smoothed_loss(logits, labels) -> float:
    """Cross-entropy with `EPSILON` of the weight spread over the vocabulary, of the tokens after each."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=EPSILON).item()


def trainer_of(model, output, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(output), label_smoothing_factor=EPSILON, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", **options,
    )  # fmt: skip
    features = [{"input_ids": i, "labels": j} for i, j in zip(IDS.tolist(), LABELS.tolist())]
    return Trainer(model, arguments, train_dataset=features, eval_dataset=features)


@pytest.mark.parametrize("kind", ["plain", "subclass", "lora", "lora of a subclass"])
def test_smoothed_labels_are_shifted(tmp_path, kind, monkeypatch):
    for name in list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if name.startswith("retnet"):  # as in a process that imports the class alone
            monkeypatch.delitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, name)
    core = hf_model("hybrid").model
    base = (Subclass if "subclass" in kind else RetNetForCausalLM).wrap(core).train()
    model = base
    if "lora" in kind:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(base, config).train()
    trainer = trainer_of(model, tmp_path)
    with torch.no_grad():
        expected = smoothed_loss(model(input_ids=IDS).logits, LABELS)
        loss = trainer.compute_loss(model, {"input_ids": IDS, "labels": LABELS.clone()})
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_training_with_smoothed_labels_learns_the_next_token(tmp_path):
    model = hf_model("both decays", init="normal", init_std=0.05)
    trainer = trainer_of(model, tmp_path, max_steps=30, learning_rate=2e-2, logging_steps=1)
    before = model(input_ids=IDS, labels=LABELS).loss.item()
    trainer.train()
    assert model.eval()(input_ids=IDS, labels=LABELS).loss.item() < 0.5 * before


def test_a_pipeline_and_model_cards_know_the_class(caplog):
    from transformers.modelcard import TASK_MAPPING

    assert "RetNetForCausalLM" in TASK_MAPPING["text-generation"].values()
    with caplog.at_level("ERROR"):
        pipeline("text-generation", model=hf_model("retention"), tokenizer=byte_tokenizer())
    assert "not supported" not in caplog.text
