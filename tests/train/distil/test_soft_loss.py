"""The divergence of two heads, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from retnet.train.distil import soft_loss
from retnet.train.distil.soft_loss import SoftTargets, linear_divergence


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.7, 0.3)])
@pytest.mark.parametrize("rows", [1000, 4])
def test_loss_and_gradients_are_those_of_all_logits_at_once(cap, weights, rows, monkeypatch):
    monkeypatch.setattr(soft_loss, "slice_rows", lambda hidden, vocab: rows)
    torch.manual_seed(0)
    R, D, V = 13, 6, 17
    hidden, weight = (torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in (R, V))
    soft = SoftTargets(torch.randn(R, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64), 2.0)
    labels = torch.randint(V, (R,))
    labels[3] = labels[7] = -100

    def capped(logits, limit):
        return logits if limit is None else limit * torch.tanh(logits / limit)

    log_p = capped(soft.hidden @ soft.weight.T, 2.0).log_softmax(-1)
    logits = capped(hidden @ weight.T, cap)
    each = F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)
    real = labels != -100
    wanted = weights[0] * each[real].mean() + weights[1] * F.cross_entropy(logits, labels, ignore_index=-100)
    gradients = torch.autograd.grad(wanted, (hidden, weight))
    loss = linear_divergence(hidden, weight, labels, cap, soft, of_divergence=weights[0], of_labels=weights[1])
    own = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    for mine, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(mine, 3 * other, rtol=1e-10, atol=1e-12)


def test_equal_heads_have_no_divergence_and_no_gradient():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    loss = linear_divergence(hidden, weight, torch.zeros(5, dtype=torch.long), None, SoftTargets(hidden, weight, None))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad.abs().max() < 1e-6


def test_without_targets_the_loss_is_zero():
    hidden, weight = torch.randn(2, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    soft = SoftTargets(torch.randn(2, 4), torch.randn(9, 4), None)
    loss = linear_divergence(hidden, weight, torch.full((2,), -100), None, soft)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
