import pytest
import torch

from retnet.ops.long_convolution import _fast_size, long_convolution, past_convolution


def by_definition(x, filters):
    return torch.stack([sum(filters[t - s] * x[:, s] for s in range(t + 1)) for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("T", [1, 2, 7, 30])
def test_it_is_a_causal_convolution(T):
    torch.manual_seed(0)
    x, filters = torch.randn(2, T, 3).double(), torch.randn(T + 4, 3).double()
    torch.testing.assert_close(long_convolution(x, filters), by_definition(x, filters), rtol=1e-12, atol=1e-12)
    assert long_convolution(x[:, :0], filters).shape == (2, 0, 3)


@pytest.mark.parametrize("T", [1, 4])
def test_decoding_from_past_inputs_equals_one_longer_convolution(T):
    torch.manual_seed(0)
    position, capacity = torch.tensor([5, 0, 9]), 9
    sequences, filters = torch.randn(3, capacity + T, 2).double(), torch.randn(40, 2).double()
    past = sequences[:, :capacity].clone()
    past[0, 5:] = past[1] = torch.nan  # slots without a token are never read
    added = past_convolution(past, position, filters, T)
    for n, p in enumerate(position.tolist()):
        x = torch.cat([sequences[n, :p], torch.zeros(T, 2).double()])[None]
        torch.testing.assert_close(added[n], by_definition(x, filters)[0, p:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 9, 11, 100, 1023, 1025, 4097])
def test_transform_sizes_are_fast_and_large_enough(size):
    fast = _fast_size(size)
    assert size <= fast < 1.5 * size + 1
    assert fast.bit_count() <= 2
