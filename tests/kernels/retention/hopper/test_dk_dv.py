"""dK and dV of one walk against float64: at most twice the error of plain retention in the same dtype."""

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.retention.hopper.dk_dv import dk_dv_supported, walk_dk_dv
from retnet.kernels.retention.hopper.warp_roles import CHUNK
from retnet.ops import reference

from .test_walk import error, make, plain


def starts_of(q, dout, log_decay, dfinal, part_chunks, parts):
    """dS [B, H, parts, K, V] after each part, by definition: the gradient of everything later with respect to it."""
    B, _, H, K = q.shape
    V, starts = dout.shape[-1], []
    for part in range(parts):
        state = torch.zeros(B, H, K, V, dtype=torch.float64, requires_grad=True)
        rest = slice((part + 1) * part_chunks * CHUNK, None)
        readers, later = q[:, rest].double().cpu(), dout[:, rest].double().cpu()
        k, v = torch.zeros_like(readers), torch.zeros_like(later)
        out, final = reference.parallel(readers, k, v, log_decay.double().cpu(), scale=K**-0.5, state=state)
        loss = (out * later).sum()
        if dfinal is not None:
            loss = loss + (final * dfinal.double().cpu()).sum()
        starts.append(torch.autograd.grad(loss, state)[0])
    return torch.stack(starts, 2).float().to(q.device)


# Triton's interpreter cannot multiply bfloat16; the kernel takes both 16-bit dtypes.
CASES = [  # B, T, H, K, V, extras, parts
    (2, 192, 3, 64, 128, "state float16", 1),
    (1, 320, 2, 64, 128, "state float16", 2),
    (2, 64, 1, 64, 64, "float16", 1),
    (1, 192, 3, 64, 64, "state float16", 3),
    pytest.param((8, 1024, 16, 64, 128, "", 1), marks=pytest.mark.gpu),
    pytest.param((2, 1088, 3, 64, 128, "state", 2), marks=pytest.mark.gpu),
    pytest.param((2, 1024, 3, 64, 64, "state", 4), marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_at_most_twice_those_of_plain_retention(case, device):
    *sizes, extras, parts = case
    inputs = make(*sizes, extras, device=device)
    q, k, v, dout, log_decay, state, dfinal, _, _ = inputs
    part_chunks = -(-q.shape[1] // CHUNK // parts)
    starts = None
    if dfinal is not None or parts > 1:
        starts = starts_of(q, dout, log_decay, dfinal, part_chunks, parts)
    assert dk_dv_supported(q, k, v, dout)
    dk, dv, dstate = walk_dk_dv(
        q, k, v, dout, log_decay, q.shape[-1] ** -0.5, starts,
        parts=parts, part_chunks=part_chunks, need_dstate=state is not None,
    )  # fmt: skip
    exact, low = plain(torch.float64, *inputs), plain(q.dtype, *inputs)
    results = {"dk": dk, "dv": dv} | ({} if dstate is None else {"dstate": dstate})
    for name, x in results.items():
        assert error(x, exact[name]) <= 2 * error(low[name], exact[name]), name


def test_slices_of_a_wider_row_are_read_in_place(device):
    q, k, v, dout, log_decay, *_ = make(2, 128, 2, 64, 128, "float16", device=device)
    wide = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
    views = [x.unflatten(-1, (2, -1)) for x in wide.split([128, 128, 256], -1)]
    assert dk_dv_supported(*views, dout)
    options = {"parts": 1, "part_chunks": 2, "need_dstate": False}
    one = walk_dk_dv(q, k, v, dout, log_decay, 1.0, None, **options)
    two = walk_dk_dv(*views, dout, log_decay, 1.0, None, **options)
    assert all(torch.equal(a, b) for a, b in zip(one[:2], two[:2]))


def test_tensors_that_are_not_a_matrix_of_whole_chunks_are_refused():
    x = torch.zeros(2, 128, 2, 64)
    assert dk_dv_supported(x, x, x, x)
    for y in (
        x[:, :100],
        torch.zeros(2, 128, 2, 192)[..., :64],
        torch.zeros(2, 256, 2, 64)[:, :128],
        x.new_zeros(2, 128, 2, 128),
    ):
        assert not dk_dv_supported(y, x, x, x)
    assert not dk_dv_supported(x, x, x.new_zeros(2, 128, 2, 256), x)
