"""A decode step of the short convolution equals the operator over one token, in place."""

import pytest
import torch
import torch.nn.functional as F

from retnet.ops.decode.short_convolution import short_convolution_step_


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("W", [2, 4])
def test_steps_equal_the_convolution_of_each_active_sequence(W, biased, activation):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    S, C = 3, 5
    weight, bias = normal(C, 1, W), normal(C) if biased else None
    recent = normal(S, W - 1, C)
    seen = [list(rows) for rows in recent.clone()]
    for step in range(2 * W):
        packed = normal(S, 2 * C + 1)
        x = packed[:, 2 : 2 + C]
        given, around = x.clone(), packed.clone()
        active = torch.tensor([True, step % 2 == 0, step % 3 != 1]) if step else None
        short_convolution_step_(x, weight, bias, recent, active, activation=activation)
        for s in range(S):
            if active is not None and not active[s]:
                continue
            seen[s].append(given[s])
            y = F.conv1d(torch.stack(seen[s][-W:], 1)[None], weight, bias, groups=C)[0, :, 0]
            torch.testing.assert_close(x[s], F.silu(y) if activation == "silu" else y, rtol=1e-13, atol=1e-13)
        around[:, 2 : 2 + C] = x
        assert torch.equal(packed, around), "the rest of a packed product is not touched"
        assert torch.equal(recent, torch.stack([torch.stack(rows[1 - W :]) for rows in seen]))


def test_half_precision_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, recent = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((4, 6), (6, 1, 4), (6,), (4, 3, 6))
    )
    window = torch.cat([recent, x[:, None]], 1).double()
    y = F.silu((window * weight[:, 0].double().T).sum(1) + bias.double())
    short_convolution_step_(x, weight, bias, recent, None, activation="silu")
    assert ((x.double() - y).abs() <= torch.finfo(torch.bfloat16).eps * y.abs()).all()
    assert torch.equal(recent.double(), window[:, 1:])
