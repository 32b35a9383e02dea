"""One layer on two devices."""

from __future__ import annotations

import torch

from retnet.layers.mixer_base import MixerModule
from retnet.layers.token_layout import TokenLayout


def assert_equal_on(devices: tuple[str, str], layer: MixerModule, width: int = 64) -> None:
    """Packed documents, left padding and a decode step of three sequences give the same outputs on both devices."""
    x, bounds = torch.randn(1, 300, width), torch.tensor([0, 100, 101, 300])
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[0, :70] = False
    results = []
    for device in devices:
        layer = layer.to(device)
        with torch.no_grad():
            pack = TokenLayout.of((1, 300), torch.device(device), cu_seqlens=bounds.to(device), carry=True)
            packed, state = layer(x.to(device), None, pack)
            rows = TokenLayout.of((2, 150), torch.device(device), mask=mask.to(device))
            padded, _ = layer(x.view(2, 150, width).to(device), None, rows)
            step = TokenLayout.of((3, 1), torch.device(device), start=state.position, carry=True, in_place=True)
            stepped, _ = layer(x.view(300, 1, width)[:3].to(device), state, step)
        results.append([packed.cpu(), padded.cpu(), stepped.cpu()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-2)
