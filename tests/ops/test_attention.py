import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from retnet.layers.token_layout import TokenLayout
from retnet.ops import attention
from retnet.ops.attention import alibi_slopes, cached_attention, causal_attention


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, slopes: Tensor | None, sinks: Tensor | None = None
) -> Tensor:
    """One query, one head and one key at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    shared = q.shape[2] // k.shape[2]
    for b, i, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = [j for j in range(i + 1) if window is None or i - j < window]
        scores = [q[b, i, h] @ k[b, j, h // shared] / math.sqrt(q.shape[3]) for j in keys]
        if slopes is not None:
            scores = [score - slopes[h] * (i - j) for score, j in zip(scores, keys)]
        exponentials = torch.stack(scores).exp()
        weights = exponentials / (exponentials.sum() + (0 if sinks is None else sinks[h].exp()))
        out[b, i, h] = sum(weight * v[b, j, h // shared] for weight, j in zip(weights, keys))
    return out


def inputs(T: int = 9, H: int = 4, G: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, T, n, 6, dtype=torch.float64, generator=generator) for n in (H, G, G))


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_causal_attention_equals_its_definition(window, alibi, heads):
    q, k, v = inputs(H=heads[0], G=heads[1])
    slopes = alibi_slopes(heads[0]) if alibi else None
    expected = by_definition(q, k, v, window, slopes)
    torch.testing.assert_close(
        causal_attention(q, k, v, window=window, slopes=slopes), expected, rtol=1e-12, atol=1e-12
    )


SINKS = torch.tensor([0.0, 1.5, -2.0, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("alibi", [False, True])
def test_sinks_take_a_share_of_the_weights(window, alibi):
    q, k, v = inputs()
    slopes = alibi_slopes(4) if alibi else None
    out = causal_attention(q, k, v, window=window, slopes=slopes, sinks=SINKS)
    expected = by_definition(q, k, v, window, slopes, SINKS)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_sink_of_no_weight_changes_nothing():
    q, k, v = inputs()
    sinks = torch.full((4,), -math.inf)
    torch.testing.assert_close(causal_attention(q, k, v, sinks=sinks), causal_attention(q, k, v), rtol=1e-12, atol=0)


@pytest.mark.parametrize("window", [None, 5, 70, 200])
@pytest.mark.parametrize(
    "options", [{}, {"slopes": alibi_slopes(4)}, {"sinks": SINKS}], ids=["plain", "alibi", "sinks"]
)
def test_blocks_of_queries_do_not_change_the_result(monkeypatch, window, options):
    q, k, v = inputs(T=150)
    positions = torch.arange(150).expand(2, -1)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    whole = cached_attention(q, k[:, order], v[:, order], positions, positions[:, order], window=window, **options)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
    monkeypatch.setattr(attention, "SINK_SCORES", 3000)  # 20 queries of 150 keys
    blocks = cached_attention(q, k[:, order], v[:, order], positions, positions[:, order], window=window, **options)
    for out in (blocks, causal_attention(q, k, v, window=window, **options)):
        torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"slopes": alibi_slopes(4)}, {"window": 4}, {"sinks": SINKS}])
def test_values_may_be_wider_or_narrower_than_keys_and_the_scale_another(options):
    q, k, v = inputs()
    v = torch.cat((v, v[..., :3]), -1)
    out = causal_attention(q, k, v, scale=0.2, **options)
    scaled = by_definition(q * 0.2 * 6**0.5, k, v, options.get("window"), options.get("slopes"), options.get("sinks"))
    torch.testing.assert_close(out, scaled, rtol=1e-12, atol=1e-12)


def test_alibi_slopes_are_those_of_the_paper():
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    # 12 heads: the 8 of H = 8, then the first 4 odd ones of H = 16
    torch.testing.assert_close(alibi_slopes(12)[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))


def flex_inputs(device: str, dtype: torch.dtype, T: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, T, 8, head_dim), (1, T, 2, head_dim), (1, T, 2, head_dim)]
    return tuple(torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes)


def flex_mask(bounds: list[int], window: int | None, device: str):
    cu_seqlens = torch.tensor(bounds, device=device)
    layout = TokenLayout.of((1, bounds[-1]), cu_seqlens.device, cu_seqlens=cu_seqlens)
    return attention.block_mask(layout.first_seen(window))


def one_by_one(q, k, v, bounds, **options) -> Tensor:
    documents = [slice(a, b) for a, b in pairwise(bounds)]
    return torch.cat([causal_attention(q[:, d], k[:, d], v[:, d], **options) for d in documents], 1)


VARIANTS = [(None, False, False), (7, False, False), (None, True, False), (7, True, True), (None, False, True)]


@pytest.mark.parametrize(("window", "alibi", "sinks"), VARIANTS)
def test_masks_for_flex_attention_separate_documents_and_windows(monkeypatch, window, alibi, sinks):
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
    q, k, v = (x.detach() for x in flex_inputs("cpu", torch.float64, 40, 16))
    v = torch.cat((v, v[..., :8]), -1)
    slopes, bounds = alibi_slopes(8) if alibi else None, [0, 12, 12, 13, 40]
    logits = torch.linspace(-2, 2, 8) if sinks else None
    out = attention.flex_causal_attention(q, k, v, flex_mask(bounds, window, "cpu"), slopes, logits)
    expected = one_by_one(q, k, v, bounds, window=window, slopes=slopes, sinks=logits)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("T", [1, 128, 517, 1300])
def test_skipped_blocks_are_those_of_the_full_mask(T, window):
    generator = torch.Generator().manual_seed(T)
    bounds = [0, *torch.randint(0, T, (5,), generator=generator).sort().values.tolist(), T]
    layout = TokenLayout.of((1, T), torch.device("cpu"), cu_seqlens=torch.tensor(bounds))
    first_seen = layout.first_seen(window)
    found = attention.block_mask(first_seen)
    whole = create_block_mask(lambda b, h, i, j: (j <= i) & (j >= first_seen[b, i]), 1, None, T, T, device="cpu")
    assert found.shape == whole.shape
    assert torch.equal(found.to_dense(), whole.to_dense())
    for name in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(getattr(found, f"{name}_num_blocks"), getattr(whole, f"{name}_num_blocks")), name


@pytest.mark.parametrize(("before", "keys"), [(0, 700), (384, 768), (300, None)])
def test_skipped_blocks_of_a_shard_are_those_of_the_full_mask(before, keys):
    first_seen = torch.tensor([[0] * 20 + [before] * 180 + [before + 200] * 100])
    found = attention.block_mask(first_seen, before, keys)
    seen = lambda b, h, i, j: (j <= i + before) & (j >= first_seen[b, i])  # noqa: E731
    whole = create_block_mask(seen, 1, None, 300, keys or before + 300, device="cpu")
    assert torch.equal(found.to_dense(), whole.to_dense())
    assert torch.equal(found.full_kv_num_blocks, whole.full_kv_num_blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "alibi", "sinks"), VARIANTS)
def test_flex_attention_of_packed_documents_equals_each_document_alone(dtype, window, alibi, sinks):
    bounds = [0, 130, 131, 300, 517]
    inputs = list(flex_inputs("cuda", dtype, 517, 64))
    if sinks:
        inputs.append(torch.linspace(-2, 2, 8, device="cuda").requires_grad_())
    slopes = alibi_slopes(8).cuda() if alibi else None
    mask = flex_mask(bounds, window, "cuda")
    out = attention.flex_causal_attention(*inputs[:3], mask, slopes, *inputs[3:])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    options = {"sinks": wide[3]} if sinks else {}
    expected = one_by_one(*wide[:3], bounds, window=window, slopes=slopes, **options)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((out.double() * weight).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), wide)
    tolerance = 2e-3 if dtype == torch.float32 else 2e-2
    for x, ref in zip((out, *grads), (expected, *expected_grads)):
        assert (x.double() - ref).norm() <= tolerance * ref.norm()
