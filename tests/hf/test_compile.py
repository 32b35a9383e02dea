"""torch.compile of the whole model: no graph break, the same results, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.small_models import hf_model

from .conftest import STACKS, random_ids

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stack", STACKS)
def test_the_whole_model_compiles_without_a_graph_break(stack, device):
    torch._dynamo.reset()
    model, ids = hf_model(stack).to(device).train(), random_ids(2, 40).to(device)
    compiled = torch.compile(model, fullgraph=True)
    losses, gradients = [], []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_evaluation_takes_masks(device):
    torch._dynamo.reset()
    model, ids = hf_model().to(device), random_ids(2, 40).to(device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(ids, attention_mask=mask, use_cache=False).logits
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.gpu
def test_generation_is_compiled_and_replayed_on_a_gpu():
    """With transformers' own settings for a static cache: one graph per step, replayed."""
    torch._dynamo.reset()
    model, ids = hf_model().to("cuda"), random_ids(2, 9).to("cuda")
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)
    compiled = model.generate(ids, max_new_tokens=24, do_sample=False, cache_implementation="static")
    assert torch.equal(compiled, expected)
