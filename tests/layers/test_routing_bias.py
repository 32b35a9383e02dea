"""Routing biases: their steps, what is counted, and the balance that they lead to."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from retnet.layers.moe import MoE, MoEConfig
from retnet.layers.routing_bias import update_routing_biases
from retnet.layers.token_layout import TokenLayout
from tests.small_models import GROUPED, PAPER, small_model

D, E = 6, 4


def build(**options) -> MoE:
    torch.manual_seed(0)
    options = {"router": "sigmoid", "bias_update_rate": 0.01} | options
    return MoE(MoEConfig(E, 2, 8, **options), D).train()


def choices(layer: MoE, x: torch.Tensor) -> list[int]:
    """How often each expert is chosen, one token at a time."""
    load = [0] * E
    for row in x.flatten(0, -2):
        value = (layer.router.weight @ row).sigmoid() + layer.routing_bias
        for e in value.argsort(descending=True)[:2].tolist():
            load[e] += 1
    return load


@pytest.mark.parametrize("tolerance", [0.0, 0.2])
def test_each_update_moves_biases_by_the_rate_against_the_load_of_its_step(tolerance):
    layer = build(bias_tolerance=tolerance)
    expected, moved = torch.zeros(E), 0
    for step in range(6):
        batches = torch.randn(2, 3, 10, D, generator=torch.Generator().manual_seed(step)) + 0.5
        load = [a + b for a, b in zip(*(choices(layer, batch) for batch in batches), strict=True)]
        for batch in batches:  # two micro-batches
            layer(batch)
        peak = update_routing_biases(layer)
        mean = sum(load) / E
        assert peak.item() == pytest.approx(max(load) / mean)
        for e in range(E):
            if abs(load[e] - mean) > tolerance * mean:
                expected[e] += 0.01 if load[e] < mean else -0.01
                moved += 1
        torch.testing.assert_close(layer.routing_bias, expected)
    assert 0 < moved < 6 * E or tolerance == 0
    assert update_routing_biases(layer).item() == 0
    torch.testing.assert_close(layer.routing_bias, expected)


def test_only_real_tokens_of_training_are_counted():
    layer, x = build(), torch.randn(2, 7, D)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:] = False
    layout = TokenLayout.of((2, 7), x.device, mask=mask, losses=[])
    layer(x, layout)
    assert layer.take_load().tolist() == choices(layer, x[mask])
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    torch.func.vmap(torch.func.grad(lambda row: layer.train()(row[None]).sum()))(x)
    assert layer.take_load().tolist() == [0] * E


@pytest.mark.parametrize("policy", ["overflow", "drop", "pad"])
def test_the_load_is_that_before_capacity(policy):
    layer, x = build(capacity_factor=0.5, capacity_policy=policy), torch.randn(2, 7, D)
    layer(x)
    assert layer.take_load().tolist() == choices(layer, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_is_repeated_leads_to_the_same_biases(reentrant):
    biases = []
    for checkpointing in (False, True):
        model = small_model([replace(PAPER, feed_forward=GROUPED)] * 2, gradient_checkpointing=checkpointing).train()
        model.checkpoint = partial(checkpoint, use_reentrant=reentrant)
        model.loss(torch.arange(20)[None], torch.arange(20)[None]).backward()
        before = model.layers[1].feed_forward.routing_bias.clone()
        update_routing_biases(model)
        biases.append(model.layers[1].feed_forward.routing_bias.clone())
        assert not torch.equal(before, biases[-1])
    assert torch.equal(*biases)


def test_steps_lead_to_balance_without_a_loss():
    layer = build(bias_update_rate=0.02, load_balance_coef=0.0)
    x = torch.randn(1, 400, D) + 1.0  # a mean that the router prefers some experts for
    peaks = []
    for _ in range(60):
        layer(x)
        peaks.append(update_routing_biases(layer).item())
    assert peaks[0] > 1.4
    assert max(peaks[-5:]) < 1.15


def test_a_model_without_biases_is_left_alone():
    assert update_routing_biases(small_model("retention")) is None


def test_biases_stay_float32_and_outlive_casts_copies_and_state_dicts():
    layer = build()
    layer.routing_bias.fill_(1 / 3)
    half = deepcopy(layer).bfloat16()
    assert (half.routing_bias.dtype, half.router.weight.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(half.routing_bias, layer.routing_bias)
    fresh = build()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.routing_bias, layer.routing_bias)
