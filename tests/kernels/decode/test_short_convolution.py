"""The decode kernel of the short convolution against its plain form."""

import pytest
import torch

from retnet.ops.decode.short_convolution import short_convolution_step_

pytest.importorskip("triton")


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(
    ("S", "C", "W", "biased", "some"),
    [(3, 5, 2, True, True), (2, 300, 4, False, True), (1, 1, 8, True, False), (0, 4, 3, False, False)],
)
def test_a_step_equals_its_plain_form(S, C, W, biased, some, activation, device):
    from retnet.kernels.decode.short_convolution import convolution_step_

    torch.manual_seed(0)
    weight, bias = torch.randn(C, 1, W), torch.randn(C) if biased else None
    packed, wide = torch.randn(S, 2 * C + 3), torch.randn(S, W - 1, C + 2)
    active = torch.arange(S) % 2 == 0 if some else None
    ours, ours_wide = packed.to(device).clone(), wide.to(device).clone()
    for shift in (1, 3):
        short_convolution_step_(
            packed[:, shift : shift + C], weight, bias, wide[..., 1 : 1 + C], active, activation=activation
        )
        there = [None if z is None else z.to(device) for z in (weight, bias, active)]
        convolution_step_(
            ours[:, shift : shift + C], there[0], there[1], ours_wide[..., 1 : 1 + C], there[2], activation
        )
    torch.testing.assert_close(ours.cpu(), packed, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours_wide.cpu(), wide, rtol=2e-6, atol=2e-6)


def test_half_precision_is_rounded_once_and_inputs_are_kept_exactly(device):
    from retnet.kernels.decode.short_convolution import convolution_step_

    torch.manual_seed(0)
    x, weight, recent = (torch.randn(*shape, device=device).bfloat16() for shape in ((2, 40), (40, 1, 4), (2, 3, 40)))
    window = torch.cat([recent, x[:, None]], 1).double()
    y = torch.nn.functional.silu((window * weight[:, 0].double().T).sum(1))
    convolution_step_(x, weight.float(), None, recent, None, "silu")
    assert ((x.double() - y).abs() <= torch.finfo(torch.bfloat16).eps * y.abs()).all()
    assert torch.equal(recent.double(), window[:, 1:])
