"""Hundreds of requests of all kinds over a few slots: each gets what it gets alone, in memory that does not grow."""

import random
import resource

import pytest

from retnet.models.decode.sampling import Sampling
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import VOCAB, prompt, small_model

from .automaton import random_automaton
from .test_engine import text_of

SLOTS = 16
CANCELLED = 0.15  # share of requests


def engine_of(model) -> Engine:
    return Engine(model, num_slots=SLOTS, max_tokens=80, prompt_chunk=8, prompt_budget=16, decode=text_of)


def random_request(rng: random.Random) -> Request:
    options = {
        "temperature": rng.choice([0, 0.7, 1.0]),
        "top_k": rng.choice([None, None, 5]),
        "top_p": rng.choice([None, None, 0.9]),
        "min_p": rng.choice([None, None, 0.05]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.5]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.2]),
        "logit_bias": rng.choice([{}, {}, {rng.randrange(VOCAB): 3.0}]),
        "logprobs": rng.choice([None, 0]),
        "seed": rng.randrange(2**63),
    }
    stop_strings = rng.choice([(), ("".join(rng.choices("abcdefgh", k=2)), "zz", "nn")])
    ids = prompt(rng.choice([1, 2, 7, 8, 9, rng.randint(1, 40)]), rng.randrange(100))
    return Request(
        ids,
        rng.randint(1, 24) if rng.random() < 0.95 else 0,
        Sampling(**options),
        stop_strings=stop_strings,
        grammar=random_automaton(rng, VOCAB) if rng.random() < 0.2 else None,
        prompt_logprobs=rng.choice([None, None, None, 2]),
        counted=rng.choice([None, None, ids[1:]]),
    )


def soak(model, num_requests: int) -> list:
    """All generations of requests that arrive in bursts while others run; some are cancelled at any point."""
    rng, engine, generations = random.Random(0), engine_of(model), []
    peak, early = 0, 0
    while len(generations) < num_requests or not engine.idle:
        if len(generations) < num_requests and rng.random() < 0.5:
            generations += [engine.submit(random_request(rng)) for _ in range(rng.randint(1, 6))]
        engine.step()
        if rng.random() < CANCELLED and not engine.idle:
            engine.cancel(rng.choice([g for g in generations if not g.finished]))
        peak = max(peak, engine.stats().running)
        if len(generations) < num_requests // 2:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early
    assert peak == SLOTS, "all slots were in use at some time"
    assert grown < 16 * 1024, f"{grown} KiB more in the second half"
    assert engine.pool.num_free == SLOTS
    return generations


def check_each_alone(model, generations) -> None:
    engine = engine_of(model)
    for generation in generations:
        again = engine.submit(generation.request)
        engine.run()
        tokens, logprobs = generation.tokens, generation.logprobs
        assert generation.prompt_logprobs == again.prompt_logprobs[: len(generation.prompt_logprobs)]
        assert tokens == again.tokens[: len(tokens)]
        assert logprobs == again.logprobs[: len(logprobs)]
        if generation.finish_reason != "cancelled":
            assert (tokens, generation.text, generation.finish_reason) == (
                again.tokens,
                again.text,
                again.finish_reason,
            )


@pytest.mark.parametrize(
    ("stack", "requests"),
    [
        ("retention", 70),
        pytest.param("retention", 2000, marks=pytest.mark.slow),
        pytest.param("hybrid", 400, marks=pytest.mark.slow),
    ],
    ids=["70", "2000", "hybrid"],
)
def test_requests_in_a_batch_get_what_each_gets_alone(stack, requests):
    model = small_model(stack)
    generations = soak(model, requests)
    reasons = {generation.finish_reason for generation in generations}
    assert reasons == {"length", "stop_string", "grammar_end", "cancelled"}
    check_each_alone(model, generations)
