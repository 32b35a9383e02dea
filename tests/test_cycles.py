"""Memory: calls leave no reference cycles behind, whose tensors would wait for Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from retnet import Engine, Request, Sampling, retention
from retnet.models.decode.generation import generate
from retnet.serve.speculation import Speculation

from .small_models import BYTES, STACKS, small_model


@contextmanager
def no_tensors_in_cycles() -> Iterator[None]:
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        left = [x for x in gc.garbage if isinstance(x, torch.Tensor)]
        holders = sorted({type(x).__name__ for x in gc.garbage})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left, f"{len(left)} tensors wait for the garbage collector, in cycles of {', '.join(holders)}"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("per_token", [False, True])
def test_retention(mode, per_token):
    q, k, v = normal(1, 37, 2, 8), normal(1, 37, 2, 8), normal(1, 37, 2, 16)
    log_decay = (-torch.rand(1, 37, 2) if per_token else -torch.rand(2)).requires_grad_()
    bounds = torch.tensor([0, 11, 37])
    retention(q, k, v, log_decay, mode=mode, chunk_size=8)  # what is made once, on the first call
    with no_tensors_in_cycles():
        for cu_seqlens in (None, bounds):
            out, state = retention(q, k, v, log_decay, mode=mode, chunk_size=8, cu_seqlens=cu_seqlens)
            torch.autograd.grad(out.sum() + state.sum(), (q, k, v, log_decay))


@pytest.mark.parametrize("stack", STACKS)
def test_training_step(stack):
    model = small_model(stack).train()
    tokens = torch.randint(model.config.vocab_size, (2, 24))
    model(tokens)
    with no_tensors_in_cycles():
        logits = model(tokens).logits
        logits.square().mean().backward()


@pytest.mark.parametrize("stack", [name for name in STACKS if name != "every mixer"])
def test_generation(stack):
    model = small_model(stack, **BYTES).eval()
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    generate(model, prompt, 2)
    with no_tensors_in_cycles():
        generate(model, prompt, 4)


@pytest.mark.parametrize("speculation", [None, Speculation(3)])
def test_engine_requests(speculation):
    engine = Engine(small_model("hybrid", **BYTES).eval(), num_slots=4, max_tokens=64, prefix_cache_bytes=1 << 20,
                    speculation=speculation)  # fmt: skip
    request = Request([1, 2, 3], 8, Sampling(temperature=1.0, seed=1), keep_state=True)
    list(engine.stream(request))
    with no_tensors_in_cycles():
        generation = engine.submit(request)
        engine.run()
        engine.submit(Request([4], 4), generation.snapshot)
        engine.run()
        del generation
