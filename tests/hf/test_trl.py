"""TRL's SFTTrainer: packs without padding, losses of documents that do not see each other, with and without LoRA."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import retnet.hf  # noqa: F401 (registers)
from tests.small_models import hf_model, random_ids

Dataset = pytest.importorskip("datasets").Dataset
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

TEXTS = [f"line {i}: the state decays and the token stays" for i in range(24)]


def trainer_for(saved, output, **options):
    arguments = trl.SFTConfig(
        output_dir=str(output), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False,
        gradient_checkpointing=False, **{"padding_free": True, "packing": True, "max_length": 256, **options},
    )  # fmt: skip
    return trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(saved),
        arguments,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(saved),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear") if output.name == "lora" else None,
    )


@pytest.mark.parametrize(
    ("saved", "kind"),
    [
        ("both decays", "lora"),
        ("hybrid", "full"),
        pytest.param("both decays", "full", marks=pytest.mark.slow),
        pytest.param("hybrid", "lora", marks=pytest.mark.slow),
    ],
    indirect=["saved"],
)
def test_sft_trains_on_packs_without_padding(saved, tmp_path, kind):
    trainer = trainer_for(saved, tmp_path / kind)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    assert (batch["position_ids"] == 0).sum() > 4, "documents are packed"
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_loss_of_packs_is_that_of_padded_rows(saved, tmp_path):
    losses = []
    for padding_free in (True, False):
        trainer = trainer_for(saved, tmp_path / "full", packing=False, padding_free=padding_free, max_length=None)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["input_ids"].shape[0] == (1 if padding_free else 4)
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_trls_own_head_scales_and_caps_logits_as_the_model_does():
    add_fused_lm_head = getattr(pytest.importorskip("trl.trainer.utils"), "add_fused_lm_head", None)
    if add_fused_lm_head is None:
        pytest.skip("this version of TRL leaves the head to the model")
    model, ids = hf_model(logit_scale=0.3, logit_soft_cap=2.0), random_ids(2, 9, high=256)
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        add_fused_lm_head(model)
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dpo_prefers_the_chosen_answers(saved, tmp_path, kind, checkpointing):
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    pairs = {"prompt": ["ab ", "cd "] * 8, "chosen": ["good", "fine"] * 8, "rejected": ["bad", "no"] * 8}
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(saved),
        args=arguments,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=AutoTokenizer.from_pretrained(saved),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear") if kind == "lora" else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
