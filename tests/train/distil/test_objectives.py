"""The losses of the two stages: what they are a mean of, what they train, and what validation shows."""

import copy

import pytest
import torch

from retnet.train.distil.choice import divergence
from retnet.train.distil.fit import layer_errors
from retnet.train.distil.objectives import AlignedForCausalLM, LogitsForCausalLM, layers_loss, logits_loss
from tests.train.distil.models import sample, teacher
from tests.train.distil.test_student import student_of


def batch(rows=1):
    ids, targets, bounds = sample()
    shape = rows, ids.shape[1] // rows
    return {
        "input_ids": ids.view(shape),
        "labels": targets.view(shape),
        "shift_labels": targets.view(shape),
        "cu_seq_lens_q": bounds,
        "begins_fresh": torch.ones(rows, dtype=torch.bool),
        "num_items_in_batch": int((targets != -100).sum()),
    }


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_layers_are_trained_on_their_error_and_nothing_else_is(recompute):
    taught = teacher(3)
    student = student_of(taught, layers=(0, 2))
    wanted = layer_errors(student, taught, [0, 2], [sample()])
    student.recompute = type(student.recompute)(recompute)
    model = AlignedForCausalLM.of(student, taught, [0, 2]).train()
    loss = model(**batch()).loss
    assert loss.item() == pytest.approx(sum(wanted.values()) / 2, rel=1e-5)
    loss.backward()
    trained = {name.split(".mixer.")[0] for name, x in model.named_parameters() if x.grad is not None}
    assert trained == {"model.layers.0", "model.layers.2"}
    assert all(x.grad is None for x in taught.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_teaches_a_student_in_float32(dtype):
    taught = teacher(2).to(dtype)
    student = student_of(taught, layers=(0,)).float()
    ids, targets, bounds = sample()
    with torch.no_grad():
        found, wanted = (
            [layers_loss(student, model, [0], ids, bounds), logits_loss(student, model, ids, targets[None], bounds)]
            for model in (taught, copy.deepcopy(taught).float())
        )
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


def test_logits_are_trained_on_the_divergence_and_a_share_of_cross_entropy():
    taught = teacher(2)
    student = student_of(taught, layers=(0,))
    nats, kl = cross_entropy(student), divergence(student, taught, [sample()])
    for share in (0.0, 0.25):
        model = LogitsForCausalLM.of(student_of(taught, layers=(0,)), taught, share).train()
        assert model(**batch(rows=2)).loss.item() == pytest.approx((1 - share) * kl + share * nats, rel=1e-4)


def test_the_divergence_is_that_of_the_logits_with_their_scale_and_soft_cap():
    taught = teacher(2, options={"logit_scale": 0.3, "logit_soft_cap": 2.0})
    student = student_of(taught, layers=(0,))
    ids, targets, bounds = sample()
    mine, theirs = (model(ids, cu_seqlens=bounds).logits[0].double().log_softmax(-1) for model in (student, taught))
    wanted = (theirs.exp() * (theirs - mine)).sum(-1)[targets != -100].mean().item()
    assert wanted > 0.01
    assert logits_loss(student, taught, ids, targets[None], bounds).item() == pytest.approx(wanted, rel=1e-4)
    assert divergence(student, taught, [sample()]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "make", [lambda s, t: AlignedForCausalLM.of(s, t, [0]), lambda s, t: LogitsForCausalLM.of(s, t, 0.0)]
)
def test_validation_shows_the_cross_entropy_of_the_student(make):
    taught = teacher(2)
    student = student_of(taught, layers=(0,))
    wanted = cross_entropy(student)
    model = make(student, taught).eval()
    assert model(**batch()).loss.item() == pytest.approx(wanted, rel=1e-5)
    assert not any("teacher" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "make", [lambda s, t: AlignedForCausalLM.of(s, t, [0]), lambda s, t: LogitsForCausalLM.of(s, t, 0.0)]
)
def test_steps_against_the_gradient_lower_the_loss(make):
    taught = teacher(2)
    model = make(student_of(taught, layers=(0,)), taught).train()
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(**batch()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


@torch.no_grad()
def cross_entropy(model):
    ids, targets, bounds = sample()
    return model.loss(ids, targets[None], cu_seqlens=bounds).item()
