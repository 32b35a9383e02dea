"""The short convolution against PyTorch's: outputs, states, packed documents, gradients."""

import pytest
import torch

from retnet.ops.short_convolution import short_convolution


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_causal_depthwise_convolution(width, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(5, 1, width, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64) if bias else None
    y, recent = short_convolution(x, weight, b)
    expected = torch.nn.functional.conv1d(x.transpose(1, 2), weight, b, padding=width - 1, groups=5)
    torch.testing.assert_close(y, expected[..., :7].transpose(1, 2), rtol=1e-13, atol=1e-13)
    assert torch.equal(recent, x[:, 7 - (width - 1) :])


@pytest.mark.parametrize("lengths", [[3, 4], [0, 1, 2, 4], [7], [1] * 7])
def test_packed_documents_equal_each_document_alone(lengths):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 7, 5, dtype=torch.float64), torch.randn(5, 1, 4, dtype=torch.float64)
    past = torch.randn(len(lengths), 3, 5, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    y, recent = short_convolution(x, weight, recent=past, cu_seqlens=bounds)
    for n in range(len(lengths)):
        one = slice(bounds[n], bounds[n + 1])
        expected, after = short_convolution(x[:, one], weight, recent=past[n : n + 1])
        assert torch.equal(y[:, one], expected)
        assert torch.equal(recent[n : n + 1], after)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradients_of_input_weight_bias_and_recent_inputs_are_right(activation):
    torch.manual_seed(0)
    shapes = [(1, 6, 2), (2, 1, 3), (2,), (2, 2, 2)]
    x, weight, bias, past = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)

    def packed(x, weight, bias, past):
        bounds = torch.tensor([0, 2, 6])
        return short_convolution(x, weight, bias, activation=activation, recent=past, cu_seqlens=bounds)

    assert torch.autograd.gradcheck(packed, (x, weight, bias, past))


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_and_values_of_the_definition(weight_dtype, activation):
    generator = torch.Generator().manual_seed(0)
    shapes, dtypes = (
        [(2, 9, 6), (6, 1, 4), (6,), (2, 3, 6)],
        [torch.bfloat16, weight_dtype, weight_dtype, torch.bfloat16],
    )
    inputs = [torch.randn(s, generator=generator).to(d).requires_grad_() for s, d in zip(shapes, dtypes, strict=True)]
    wide = [z.detach().double().requires_grad_() for z in inputs]
    x, weight, bias, past = inputs
    y, _ = short_convolution(x, weight, bias, activation=activation, recent=past)
    pre = torch.nn.functional.conv1d(torch.cat([wide[3], wide[0]], 1).mT, wide[1], wide[2], groups=6).mT
    expected = torch.nn.functional.silu(pre) if activation == "silu" else pre
    dy = torch.randn(y.shape, generator=generator).bfloat16()
    found = [y, *torch.autograd.grad(y, inputs, dy)]
    right = [expected, *torch.autograd.grad(expected, wide, dy.double())]
    for a, b, dtype in zip(found, right, [torch.bfloat16, *dtypes], strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 1e-2 * b.norm()
    for needed in range(3):  # the others are constants
        alone = [z.detach().requires_grad_(i == needed) for i, z in enumerate(inputs)]
        y, _ = short_convolution(*alone[:3], activation=activation, recent=alone[3])
        (gradient,) = torch.autograd.grad(y, alone[needed], dy)
        assert torch.equal(gradient, found[1 + needed])


def test_without_gradients_the_result_is_the_same_bit_for_bit():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 6, requires_grad=True), torch.randn(6, 1, 4), torch.randn(6)
    given = x.detach().clone()
    for activation in ("none", "silu"):
        y, _ = short_convolution(x, weight, bias, activation=activation)
        with torch.no_grad():
            assert torch.equal(short_convolution(x, weight, bias, activation=activation)[0], y)
    assert torch.equal(x, given)
