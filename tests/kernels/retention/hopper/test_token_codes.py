"""Token codes of masks and packed documents, and the states that parts start from."""

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.retention.hopper.part_starts import part_starts_kernel
from retnet.kernels.retention.hopper.token_codes import token_codes
from retnet.kernels.retention.hopper.warp_roles import CHUNK


def unpack(codes):
    """(document, special, count) of codes; the document is complemented for masked tokens."""
    return codes >> 8, (codes >> 7) & 1, codes & 127


def test_codes_give_the_document_of_every_token(device):
    cu = torch.tensor([0, 5, 5, 64, 192, 300, 301, 400, 401], device=device)
    document, special, count = unpack(token_codes(1, 401, None, cu, torch.device(device)).cpu())
    expected = torch.searchsorted(cu.cpu()[1:], torch.arange(401), right=True)
    assert torch.equal(document[0, :401].long(), expected)
    assert (document[0, 401:] == ~expected[-1]).all(), "padding is masked and belongs to the last document"
    # Chunks 2 and 5 lie inside one document; chunk 3 starts at the boundary at 192, the others contain one.
    assert special.view(-1, CHUNK).T.unique(dim=0).tolist() == [[1, 1, 0, 1, 1, 0, 1]]
    assert count.view(-1, CHUNK)[:, -1].tolist() == [64] * 6 + [17]


def test_codes_count_the_unmasked_tokens(device):
    mask = torch.ones(2, 130, dtype=torch.bool)
    mask[0, 3:7] = mask[1, -1] = False
    codes = token_codes(2, 130, mask.to(device), None, torch.device(device)).cpu()
    document, special, count = unpack(codes)
    assert torch.equal(codes[:, :130] >= 0, mask)
    assert special[:, ::CHUNK].tolist() == [[1, 0, 1], [0, 0, 1]]
    within_chunks = torch.nn.functional.pad(mask, (0, 62)).view(2, 3, CHUNK).cumsum(-1)
    assert torch.equal(count.view(2, 3, CHUNK).long(), within_chunks)
    assert ((document == 0) | (document == -1)).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_parts_start_from_the_state_that_earlier_parts_leave(device, reverse, packed):
    B, H, size, part_chunks, T = 1 if packed else 2, 2, 70, 2, 5 * CHUNK + 9
    parts = 3
    own = torch.randn(B, H, parts, size)
    initial = torch.randn(B, H, size)
    log_decay = torch.tensor([-0.01, -0.3])
    lengths = torch.tensor([128, 128, T - 256])
    kept = torch.exp(log_decay[:, None] * lengths)[..., None]
    codes = None
    if packed:  # a boundary within the second part
        cu = torch.tensor([0, 150, T], device=device)
        codes = token_codes(1, T, None, cu, torch.device(device))
        kept[:, 1] = 0

    state, order = initial, range(parts - 1, -1, -1) if reverse else range(parts)
    expected = torch.empty_like(own)
    for n in order:
        expected[:, :, n] = state
        state = kept[:, n] * state + own[:, :, n]

    states = own.clone().to(device)
    rate = log_decay.to(device)
    part_starts_kernel[(B * H, 2)](
        states,
        initial.to(device),
        rate,
        rate if codes is None else codes,
        rate,
        T,
        part_chunks,
        parts,
        H,
        size,
        HAS_INITIAL=True,
        HAS_CODES=packed,
        PER_TOKEN=False,
        REVERSE=reverse,
        CHUNK=CHUNK,
        BLOCK=64,
    )
    torch.testing.assert_close(states.cpu(), expected, rtol=1e-5, atol=1e-5)
