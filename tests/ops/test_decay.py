"""Decays: schedules, norms, and products that survive long sequences."""

import math

import pytest
import torch

from retnet import retention, retention_step_
from retnet.ops.decay import decay_norm, experiment_log_decay, paper_log_decay, window
from retnet.ops.reference import recurrent

from .conftest import relative_error


def test_schedules_are_those_of_the_paper():
    assert torch.allclose(paper_log_decay(3).exp(), torch.tensor([31 / 32, 63 / 64, 127 / 128]))
    assert torch.allclose(experiment_log_decay(2).exp(), torch.tensor([31 / 32, 511 / 512]))
    assert (paper_log_decay(40)[:35] < 0).all(), "no head may round to no decay"


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.96875, 1 - 2**-20, 1.0])
def test_decay_norm_is_the_square_root_of_the_sum(gamma):
    log_decay = torch.tensor([gamma], dtype=torch.float64).log()
    for n in (0, 1, 5, 1000):
        expected = math.sqrt(sum(gamma**i for i in range(n + 1)))
        assert decay_norm(log_decay, torch.tensor(n)).item() == pytest.approx(expected, rel=1e-12)


def test_window_counts_tokens_until_one_percent():
    assert window(math.log(0.5)) == 7
    assert 0.5**7 < 0.01 < 0.5**6
    assert window(0.0) == math.inf
    assert window(-math.inf) == 1


@pytest.mark.parametrize("form", ["recurrent", "chunkwise", "one token a call"])
def test_rounding_of_thousands_of_decays_does_not_accumulate(form):
    """exp(log_decay) rounded to float32 and applied at each token would be off by ten times the bound."""
    T, gammas = 5_000, torch.tensor([1 - 1e-3, 1 - 1e-4, 1 - 1e-5], dtype=torch.float64)
    log_decay = gammas.log().float()
    q, k = (torch.randn(1, T, 3, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    v = 1 + 0.1 * torch.randn(1, T, 3, 2, generator=torch.Generator().manual_seed(2))
    k = k.abs()
    _, expected = recurrent(q.double(), k.double(), v.double(), log_decay.double())
    if form == "one token a call":
        state = torch.zeros(1, 3, 2, 2)
        for t in range(T):
            one = slice(t, t + 1)
            retention_step_(q[:, one], k[:, one], v[:, one], log_decay, state)
    else:
        _, state = retention(q, k, v, log_decay, mode=form)
    assert relative_error(state, expected) < 4e-6
