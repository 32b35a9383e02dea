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


def test_gradients_of_input_weight_bias_and_recent_inputs_are_right():
    torch.manual_seed(0)
    shapes = [(1, 6, 2), (2, 1, 3), (2,), (2, 2, 2)]
    x, weight, bias, past = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)

    def packed(x, weight, bias, past):
        return short_convolution(x, weight, bias, recent=past, cu_seqlens=torch.tensor([0, 2, 6]))

    assert torch.autograd.gradcheck(packed, (x, weight, bias, past))
