"""A chunk size that the kernels lack: the nearest one runs, and one warning says so."""

import warnings

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.retention import dispatch
from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops import reference


def forward(chunk_size: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 130, 1, 16, generator=generator).to(device)
    problem = RetentionProblem(x, x, x, torch.tensor([-0.1], device=device), 1.0, chunk_size=chunk_size)
    out, _ = dispatch.retention_forward(problem, None)
    wide = x.double()
    expected, _ = reference.parallel(wide, wide, wide, problem.log_decay.double(), scale=1.0)
    assert (out.double() - expected).norm() <= 2e-6 * expected.norm()
    return out


def test_a_chunk_size_that_is_not_used_warns_once(device, monkeypatch):
    monkeypatch.setattr(dispatch, "_reported", set())
    with pytest.warns(UserWarning, match=r"chunks of 64 tokens instead of chunk_size=60: .* 64, 128, 256") as warned:
        first, second = forward(60, device), forward(60, device)
    assert len(warned) == 1
    assert torch.equal(first, second)
    assert torch.equal(first, forward(64, device))
    with pytest.warns(UserWarning, match="chunks of 128 tokens instead of chunk_size=127"):
        forward(127, device)


@pytest.mark.parametrize("chunk_size", [0, 64, 128])
def test_a_chunk_size_that_is_used_does_not_warn(chunk_size, device, monkeypatch):
    monkeypatch.setattr(dispatch, "_reported", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(chunk_size, device)
