"""PEFT: adapters are trained, saved and merged, also one on the head, which the fused loss must not skip."""

from __future__ import annotations

import pytest
import torch

from retnet.models.directory import load_model, save_model
from retnet.models.hf import RetNetForCausalLM
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
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompt_tuning_reads_the_sizes_and_trains_in_front_of_the_text(stack, kind):
    base = hf_model(stack, init="normal", init_std=0.05)
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    sizes = model.active_peft_config
    assert (sizes.token_dim, sizes.num_layers, sizes.num_attention_heads) == (32, len(base.model.layers), 2)
    losses = train(model, steps=20)
    assert losses[-1] < losses[0]


def every_second() -> list:
    """Stacks, heads that are the embedding or not, and what is trained: every pair of values is in a fast test."""
    trained = {
        "tokens": {"trainable_token_indices": [5, 97, 98]},
        "embedding": {"modules_to_save": ["embedding"]},
        "head": {"modules_to_save": ["head"]},
    }
    cases = []
    for i, stack in enumerate(STACKS):
        for j, tied in enumerate((True, False)):
            for k, (name, options) in enumerate(trained.items()):
                marks = () if (i + j + k) % 2 == 0 else pytest.mark.slow
                cases.append(pytest.param(stack, tied, options, marks=marks, id=f"{name}-{tied}-{stack}"))
    return cases


@pytest.mark.parametrize(("stack", "tied", "options"), every_second())
def test_trained_tokens_and_heads_are_merged_and_saved_by_every_writer(tmp_path, stack, tied, options):
    """PEFT reads from the configuration whether the head is the embedding, and unties them there."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model, ids = peft.get_peft_model(hf_model(stack, tie_embeddings=tied), config), random_ids(2, 7)
    train(model, steps=3)
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "transformers")
    save_model(merged.model, tmp_path / "native")
    loaded = [load_model(tmp_path / "native"), load_model(tmp_path / "transformers")]
    loaded += [RetNetForCausalLM.from_pretrained(tmp_path / name) for name in ("native", "transformers")]
    for other in (merged, *loaded):
        torch.testing.assert_close(other(ids).logits, expected, rtol=1e-3, atol=1e-3)
