"""Running sums of log decays inside chunks, against their definition in float64."""

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.retention.hopper.token_sums import token_sums


@pytest.mark.parametrize(("B", "T", "H"), [(2, 130, 3), (1, 64, 17), (1, 1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_start_at_every_chunk_and_skip_masked_tokens(B, T, H, masked, device):
    generator = torch.Generator().manual_seed(0)
    log_decay = -torch.rand(B, T, H, generator=generator)
    log_decay[:, T // 2, 0] = -torch.inf
    log_decay[0, T // 3] = -1e30
    mask = torch.rand(B, T, generator=generator) < 0.6 if masked else None
    found = token_sums(log_decay.to(device), None if mask is None else mask.to(device)).cpu()
    chunks = -(-T // 64)
    assert found.shape == (B, H, 64 * chunks)
    each = (log_decay.double() / torch.tensor(2.0).double().log()).clamp(min=-160)
    if mask is not None:
        each = each * mask[..., None]
    each = torch.nn.functional.pad(each, (0, 0, 0, 64 * chunks - T)).unflatten(1, (chunks, 64))
    wanted = each.cumsum(2).flatten(1, 2).mT
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_first_token_of_a_document_is_a_reset(device):
    log_decay = -torch.rand(1, 200, 2)
    log_decay[0, 70] = 0
    mask = torch.ones(1, 200, dtype=torch.bool)
    mask[0, 130] = False
    cu = torch.tensor([0, 70, 70, 130, 200])
    found = token_sums(log_decay.to(device), mask.to(device), cu.to(device)).cpu()
    before = torch.nn.functional.pad(found, (1, 0))[..., :-1]
    before[..., ::64] = 0
    resets = (found - before < -159).nonzero()
    assert resets[resets[:, 1] == 0][:, 2].tolist() == [0, 70, 130]
    assert resets[resets[:, 1] == 1][:, 2].tolist() == [0, 70, 130]


def test_strides_are_read_in_place_and_nan_stays(device):
    wide = -torch.rand(1, 70, 4, 2)
    wide[0, 5, 1, 0] = torch.nan
    found = token_sums(wide[..., 0].to(device), None)
    assert torch.equal(
        found.cpu().nan_to_num(7), token_sums(wide[..., 0].contiguous().to(device), None).cpu().nan_to_num(7)
    )
    assert found[0, 1, 5:64].isnan().all()
    assert not found[0, 1, :5].isnan().any()
    assert not found[0, [0, 2, 3]].isnan().any()
