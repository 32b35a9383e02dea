"""Attention in parts of the keys is scaled dot-product attention."""

import math

import pytest
import torch
import torch.nn.functional as F

from retnet.ops import split_attention
from retnet.ops.attention import cached_attention
from retnet.ops.split_attention import attend_in_parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(split_attention, "PART", 8)
    monkeypatch.setattr(split_attention, "LEAST_KEYS", 8)


def draw(S: int, dtype: torch.dtype, B: int = 2, G: int = 3, N: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(S)
    k, v = (torch.randn(B, S, G, n, generator=generator, dtype=torch.float64).to(dtype) for n in (6, 7))
    q = 3 * torch.randn(B, G, N, 6, generator=generator, dtype=torch.float64).to(dtype)
    return q, k.transpose(1, 2), v.transpose(1, 2)


@pytest.mark.parametrize("S", [1, 7, 8, 24, 29])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_parts_add_up_to_the_whole(S, added, scale):
    """Whole parts may be hidden from a query, at the start and at the end."""
    q, k, v = draw(S, torch.float64)
    mask = torch.rand(2, 1, 5, S, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[0, :, :2, S // 2 :] = mask[0, :, 2:, : S // 2] = False
    mask[..., -1] |= ~mask.any(-1)
    if added:
        mask = torch.randn(2, 3, 5, S, dtype=torch.float64).masked_fill(~mask, -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(attend_in_parts(q, k, v, mask, scale), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_rounds_no_scores(device):
    q, k, v = (x.to(device) for x in draw(40, torch.bfloat16))
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool, device=device)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = attend_in_parts(q, k, v, mask, None)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_cached_attention_of_few_queries_takes_parts_where_they_are_faster(device, monkeypatch):
    monkeypatch.setattr(split_attention, "DEVICES", (device,))
    q, k, v = (x.transpose(1, 2).float().to(device) for x in draw(30, torch.float32, B=1, N=2))
    places = torch.tensor([[25, 27]], device=device), torch.arange(30, device=device)[None]
    parts = cached_attention(q, k, v, *places)
    assert split_attention.reads_in_parts(q.transpose(1, 2), k.transpose(1, 2))
    monkeypatch.setattr(split_attention, "MOST_QUERIES", 0)
    torch.testing.assert_close(parts, cached_attention(q, k, v, *places), rtol=1e-5, atol=1e-6)
