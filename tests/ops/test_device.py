"""Kernels are launched on the GPU of their tensors."""

from types import SimpleNamespace

import pytest
import torch

from retnet.ops.device import current_device_of
from retnet.ops.retention import retention
from retnet.ops.selective_scan import selective_scan


@pytest.mark.parametrize(("device", "entered"), [("cuda:1", ["cuda:1"]), ("cuda:0", []), ("cpu", [])])
def test_the_gpu_of_the_tensors_is_made_current(device, entered, monkeypatch):
    seen = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            seen.append(str(self.device))

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    with current_device_of(SimpleNamespace(device=torch.device(device))):
        pass
    assert seen == entered


def retained(leaves):
    return retention(*leaves, torch.tensor([-0.01, -0.1], device=leaves[0].device))[0]


def scanned(leaves):
    x, step, rate, write, read = leaves
    return selective_scan(x, step.sigmoid(), -rate.exp(), write, read)[0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        (retained, [(1, 200, 2, 64)] * 3),
        (scanned, [(1, 200, 32), (1, 200, 32), (32, 16), (1, 200, 16), (1, 200, 16)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_of_a_second_gpu_are_computed_there(form, shapes, dtype):
    def results(device):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
        out = form(leaves)
        return [x.cpu() for x in (out, *torch.autograd.grad(out.float().sum(), leaves))]

    assert all(torch.equal(a, b) for a, b in zip(results("cuda:0"), results("cuda:1"), strict=True))
