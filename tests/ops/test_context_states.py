"""States of a shard from its tokens alone: sums of decays over many chunks, and the weighted product."""

import pytest
import torch

from retnet import retention
from retnet.ops.context_states import CHUNK, Decays, weighted_state


def draws(T: int, per_token: bool, masked: bool):
    generator = torch.Generator().manual_seed(T)
    decay = -(10 ** (-6 * torch.rand(*((2, T, 3) if per_token else (3,)), generator=generator, dtype=torch.float64)))
    if per_token:
        decay[:, T // 3, 0] = -torch.inf
    else:
        decay[0] = -torch.inf
    mask = torch.rand(2, T, generator=generator) < 0.7 if masked else None
    return decay, mask


@pytest.mark.parametrize("T", [1, CHUNK, 2 * CHUNK + 7])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_decays_are_those_over_all_tokens(T, per_token, masked):
    decay, mask = draws(T, per_token, masked)
    each = decay.expand(2, T, 3) if mask is None else decay.expand(2, T, 3).masked_fill(~mask[..., None], 0)
    upto = torch.stack([each[:, : t + 1].sum(1) for t in range(T)], 1)
    after = torch.stack([each[:, t + 1 :].sum(1) for t in range(T)], 1)
    sums = Decays(decay, T, mask)
    for found, expected in ((sums.upto(), upto), (sums.after(), after), (sums.total(), upto[:, -1, :, None, None])):
        torch.testing.assert_close(found.expand_as(expected), expected)


@pytest.mark.parametrize(("G", "K", "V"), [(3, 4, 6), (3, 6, 4), (1, 4, 6)])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_weighted_product_is_the_final_state(G, K, V, per_token):
    T, generator = 600, torch.Generator().manual_seed(1)
    decay, _ = draws(T, per_token, False)
    k, v = (torch.randn(2, T, *x, generator=generator, dtype=torch.float64) for x in ((G, K), (3, V)))
    _, expected = retention(k, k, v, decay, mode="chunkwise")
    torch.testing.assert_close(weighted_state(k, v, Decays(decay, T, None).after()), expected, rtol=1e-9, atol=1e-9)
    narrow = weighted_state(k.bfloat16(), v.bfloat16(), Decays(decay.float(), T, None).after())
    assert narrow.dtype == torch.float32
    assert (narrow - expected).norm() < 0.01 * expected.norm()
