"""Detection of losses that are not finite, with their step and documents."""

from __future__ import annotations

import math

import pytest
import torch

from retnet.train.losses import LossWatch, all_finite


def make_watch():
    return LossWatch(lambda row: [f"document {row}a", f"document {row}b"])


def test_checked_losses_are_forgotten():
    watch = make_watch()
    assert watch.check() is None
    for step in range(3):
        watch.add(step, (step,), torch.tensor(1.0))
    assert watch.check() is None
    watch.add(4, (4,), torch.tensor(math.nan))
    assert "step 4" in watch.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_not_finite_is_reported_with_its_documents(value):
    watch = make_watch()
    watch.add(1, (10, 11), torch.tensor(2.0))
    watch.add(1, (12, 13), torch.tensor(value))
    watch.add(2, (14,), torch.tensor(math.nan))
    problem = watch.check()
    assert problem == (f"loss is {value} at step 1, trained on document 12a; document 12b; document 13a; document 13b")
    assert len(watch.documents) == 4


def test_a_long_list_of_documents_is_shortened():
    watch = make_watch()
    watch.add(1, tuple(range(20)), torch.tensor(math.nan))
    assert watch.check().endswith("document 5b; and 28 more")
    assert len(watch.documents) == 40


def test_a_weight_that_is_not_finite_is_detected():
    module = torch.nn.Linear(3, 3)
    assert all_finite(module)
    with torch.no_grad():
        module.bias[1] = math.inf
    assert not all_finite(module)
