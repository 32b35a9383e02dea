"""Scores of extreme logits, balance per document, and groups under capacity."""

import math
from itertools import pairwise

import pytest
import torch

from retnet.layers.moe import MoE, MoEConfig
from retnet.layers.routing import affinities, assign, preferences, sequence_balance_loss
from retnet.layers.token_layout import TokenLayout


def random_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_root_of_softplus_has_gradients_at_every_logit(dtype):
    values = [-1e4, -300.0, -79.0, -1.0, 0.0, 1.0, 39.0, 300.0]
    logits = torch.tensor(values, dtype=dtype, requires_grad=True)
    scores = affinities(logits, "sqrt_softplus")
    (gradient,) = torch.autograd.grad(scores.sum(), logits)
    for x, score, slope in zip(values[2:], scores[2:].tolist(), gradient[2:].tolist(), strict=True):
        softplus = max(x, 0) + math.log1p(math.exp(-abs(x)))
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        assert score == pytest.approx(math.sqrt(softplus), rel=tolerance)
        assert slope == pytest.approx(0.5 / math.sqrt(softplus) / (1 + math.exp(-x)), rel=tolerance)
    assert gradient.isfinite().all()
    assert (scores > 0).all()


def test_the_balance_of_documents_is_the_mean_of_their_own_weighted_by_tokens():
    scores, bounds, top_k = random_scores(14, 5), [0, 1, 6, 6, 14], 2
    expected = 0.0
    for begin, end in pairwise(bounds):
        f, p = [0.0] * 5, [0.0] * 5
        for row in scores[begin:end].tolist():
            for e in sorted(range(5), key=lambda e: -row[e])[:top_k]:
                f[e] += 5 / (top_k * (end - begin))
            for e in range(5):
                p[e] += row[e] / sum(row) / (end - begin)
        expected += (end - begin) / 14 * sum(a * b for a, b in zip(f, p, strict=True))
    assert sequence_balance_loss(scores, top_k, torch.tensor(bounds)).item() == pytest.approx(expected, rel=1e-12)


def test_the_balance_of_documents_is_the_same_in_packs_rows_and_pads_and_trains_the_router():
    torch.manual_seed(0)
    config = MoEConfig(5, 2, 8, router="sigmoid", load_balance_coef=0.0, sequence_balance_coef=0.3)
    layer = MoE(config, 6).double().train()
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = mask[1, 6:] = False
    bounds = torch.tensor([0, 5, 11])
    padded = TokenLayout.of((2, 8), x.device, mask=mask, losses=[])
    packed = TokenLayout.of((1, 11), x.device, cu_seqlens=bounds, losses=[])
    rows = [TokenLayout.of((1, int(n)), x.device, losses=[]) for n in bounds.diff()]
    layer(x, padded)
    layer(x[mask][None], packed)
    for layout, row, real in zip(rows, x, mask, strict=True):
        layer(row[real][None], layout)
    weighted = (5 * rows[0].losses[0] + 6 * rows[1].losses[0]) / 11
    for losses in (padded.losses, packed.losses):
        assert len(losses) == 1
        torch.testing.assert_close(losses[0], weighted, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(packed.losses[0], layer.router.weight)
    assert gradient.norm() > 0


def test_a_token_without_room_in_its_groups_goes_to_no_other_group():
    preferred = preferences(random_scores(40, 6), None, num_groups=3, top_groups=1)
    assert ((preferred > -math.inf).sum(-1) == 2).all()
    room, bounds = torch.tensor([7]), torch.tensor([0, 40])
    experts, _, kept = assign(preferred, 2, room, bounds, overflow=True)
    assert (~kept).any()
    allowed = preferred.gather(-1, experts) > -math.inf
    assert allowed[kept].all()
    assert torch.stack([((experts == e) & kept).sum() for e in range(6)]).max() <= 7
