"""The sliced loss is cross-entropy, with its gradients, in little memory."""

import pytest
import torch
import torch.nn.functional as F

from retnet.models import loss
from retnet.models.loss import linear_cross_entropy
from tests.small_models import small_model


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("slice_bytes", [1, 400, 1 << 20])
def test_it_is_cross_entropy_with_its_gradients(monkeypatch, soft_cap, slice_bytes):
    monkeypatch.setattr(loss, "SLICE_BYTES", slice_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels[0, 2] = -100
    logits = F.linear(hidden, weight)
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    got = linear_cross_entropy(hidden, weight, labels, soft_cap)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(
        torch.autograd.grad(3 * got, (hidden, weight)), torch.autograd.grad(3 * expected, (hidden, weight))
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_labels_all_ignored_give_zero():
    weight = torch.randn(11, 5, requires_grad=True)
    value = linear_cross_entropy(torch.randn(3, 5), weight, torch.full((3,), -100))
    value.backward()
    assert value.item() == 0
    assert (weight.grad == 0).all()


def test_half_precision_loses_nothing_of_the_sum():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (300, 500))
    labels = torch.randint(0, 500, (300,), generator=generator)
    exact = F.cross_entropy(F.linear(hidden, weight).double(), labels)
    assert linear_cross_entropy(hidden, weight, labels).item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_whole_models_loss_uses_no_full_logits(monkeypatch):
    model = small_model(vocab_size=4001)
    monkeypatch.setattr(model, "logits", lambda hidden: pytest.fail("logits of all tokens were made"))
    x = torch.randint(0, 4001, (2, 9))
    model.loss(x[:, :-1], x[:, 1:]).backward()
    assert model.embedding.weight.grad.abs().sum() > 0
