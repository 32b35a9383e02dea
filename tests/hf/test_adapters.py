"""PEFT: adapters are trained, saved and merged, also one on the head, which the fused loss must not skip."""

from __future__ import annotations

import pytest
import torch

from tests.small_models import hf_model

from .conftest import STACKS, random_ids

peft = pytest.importorskip("peft")

RETENTION = ["q_proj", "k_proj", "v_proj", "gate_proj", "out_proj"]


def train(model, steps=8):
    ids = random_ids(4, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize(
    ("stack", "targets"),
    [
        ("both decays", RETENTION),
        ("both decays", "all-linear"),
        ("both decays", [*RETENTION, "head"]),
        ("hybrid", "all-linear"),
    ],
    ids=["retention", "all", "head", "hybrid"],
)
def test_lora_trains_is_saved_and_merged(tmp_path, stack, targets):
    base = hf_model(stack, init="normal", init_std=0.05)
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    if "head" in targets:
        assert any(
            "head" in name and p.grad is None and bool(p.any())
            for name, p in model.named_parameters()
            if "lora_B" in name
        )

    ids = random_ids(2, 7)
    adapted = model(ids).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(hf_model(stack, init="normal", init_std=0.05), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, adapted)
    assert torch.equal(
        model.generate(input_ids=ids, max_new_tokens=5, do_sample=False),
        again.generate(input_ids=ids, max_new_tokens=5, do_sample=False),
    )
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in merged.named_parameters()} == set(frozen)


@pytest.mark.parametrize("stack", STACKS)
def test_prompt_tuning_trains_in_front_of_the_text(stack):
    base = hf_model(stack, init="normal", init_std=0.05)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=32, num_layers=2,
                                     num_attention_heads=2)  # fmt: skip
    model = peft.get_peft_model(base, config)
    losses = train(model, steps=20)
    assert losses[-1] < losses[0]
