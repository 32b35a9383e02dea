"""Output does not depend on the modes of torch that the callers of the engine have on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from retnet.models.decode.sampling import Sampling
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from tests.small_models import prompt, small_model

from .test_engine import engine_of, facts

REQUEST = Request(prompt(9) * 2, 7, Sampling(temperature=0.8, seed=3, top_p=0.9, logprobs=1, logit_bias={3: 1.0}))
Mode = Callable[[], AbstractContextManager[object]]
MODES: dict[str, Mode] = {
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


def served(model, mode: Mode, making: Mode = nullcontext, **options) -> list:
    """Requests whose first steps run in a mode, and one that then finds their prefix and continues their state."""
    with making():
        engine = engine_of(model, num_slots=1, prefix_cache_bytes=10**6, **options)
    first = engine.submit(REQUEST)
    with mode():
        while first.num_new < 3:
            engine.step()
        snapshot = engine.snapshot(first)
    engine.run()
    after = [engine.submit(REQUEST), engine.submit(Request([], 3, REQUEST.sampling), snapshot)]
    engine.run()
    assert engine.stats().prefix.hits > 0
    assert not any(x.requires_grad or x.is_inference() for x in engine.pool.state.named_tensors().values())
    return [facts(generation) for generation in (first, *after)]


@pytest.mark.parametrize("options", [{"deferred_writes": 16}, {"speculation": Speculation(3)}], ids=str)
def test_output_is_the_same_in_every_mode_of_the_caller(options):
    model = small_model("hybrid")
    expected = served(model, nullcontext, **options)
    for name, mode in MODES.items():
        assert served(model, mode, **options) == expected, name
    assert served(model, nullcontext, torch.inference_mode, **options) == expected


def test_a_model_that_was_made_in_inference_mode_is_served():
    expected = served(small_model("hybrid"), nullcontext)
    with torch.inference_mode():
        model = small_model("hybrid")
    assert served(model, nullcontext) == expected
