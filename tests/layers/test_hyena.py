import math

import pytest
import torch

from retnet.layers.hyena import FilterNetwork, Hyena, HyenaConfig
from retnet.layers.token_layout import TokenLayout


def test_filters_depend_on_the_distance_alone():
    network = FilterNetwork(8, 4, decay=0.01).double()
    torch.testing.assert_close(network(200)[:50], network(50), rtol=1e-13, atol=1e-13)


def test_the_window_decays_by_its_rate_per_token():
    plain, windowed = FilterNetwork(8, 4, decay=0.0).double(), FilterNetwork(8, 4, decay=0.25).double()
    windowed.load_state_dict(plain.state_dict())
    expected = plain(20) * torch.exp(-0.25 * torch.arange(20.0, dtype=torch.float64))[:, None]
    torch.testing.assert_close(windowed(20), expected)


def test_filters_kept_in_inference_follow_the_weights():
    network = FilterNetwork(8, 4, decay=0.0)
    with torch.no_grad():
        before = network(10).clone()
        assert network(12).data_ptr() == network(10).data_ptr()
        network.filter_out.weight.data.mul_(2)  # leaves neither another tensor nor another version
        torch.testing.assert_close(network(10), 2 * before)


def test_filters_start_so_that_a_thousand_tokens_weigh_as_much_as_the_skip():
    torch.manual_seed(0)
    energy = FilterNetwork(64, 256, decay=0.0)(1024).square().sum(0)
    assert 0.5 < energy.mean().sqrt() < 2


def test_the_definition_of_the_operator():
    torch.manual_seed(0)
    D, T, order = 3, 6, 2
    layer = Hyena(HyenaConfig(order=order, filter_hidden=4, conv_width=1), D).double()
    with torch.no_grad():
        layer.filters.filter_out.weight.normal_()
        layer.skip.normal_()
    x = torch.randn(1, T, D).double()
    u = layer.in_proj(x) * layer.conv.weight[:, 0, 0] + layer.conv.bias
    z, *gates = u.unflatten(-1, (order + 1, D)).unbind(2)
    filters = layer.filters(T).unflatten(-1, (order, D))
    for i, gate in enumerate(gates):
        y = torch.stack([sum(filters[t - s, i] * z[:, s] for s in range(t + 1)) for t in range(T)], 1)
        z = gate * (y + layer.skip[i] * z)
    torch.testing.assert_close(layer(x, None, TokenLayout.of((1, T), x.device))[0], layer.out_proj(z))


def test_the_state_holds_the_inputs_of_every_token():
    layer = Hyena(HyenaConfig(order=3), 8)
    _, state = layer(torch.randn(2, 10, 8), None, TokenLayout.of((2, 10), torch.device("cpu"), carry=True))
    assert state.inputs.shape == (2, 10, 3, 8)
    assert state.recent.shape == (2, 2, 32)


@pytest.mark.parametrize(("option", "value"), [("order", 0), ("filter_decay", -0.1), ("filter_decay", math.inf)])
def test_invalid_configurations_are_refused_with_a_reason(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}; accepted"):
        HyenaConfig(**{option: value})
