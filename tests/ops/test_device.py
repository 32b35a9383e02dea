"""Kernels are launched on the device of their tensors."""

from types import SimpleNamespace

import pytest
import torch

from retnet.ops.device import current_device_of


@pytest.mark.parametrize(("device", "entered"), [("cuda:1", ["cuda:1"]), ("cuda:0", []), ("cpu", [])])
def test_another_gpu_is_made_current(device, entered, monkeypatch):
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


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_second_gpu_are_computed_there():
    from retnet import retention

    def results(device):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 200, 2, 64, generator=generator).bfloat16().to(device) for _ in range(3))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = retention(*leaves, torch.tensor([-0.01, -0.1], device=device))[0]
        return [x.cpu() for x in (out, *torch.autograd.grad(out.float().sum(), leaves))]

    assert all(torch.equal(a, b) for a, b in zip(results("cuda:0"), results("cuda:1"), strict=True))
