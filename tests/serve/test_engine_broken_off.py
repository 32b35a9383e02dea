"""Exceptions at any line of a call, Ctrl-C among them: requests in doubt fail, all others get their own tokens."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import pytest
import torch

from retnet.models.decode.sampling import Sampling
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from tests.small_models import VOCAB, prompt, small_model

from .automaton import Automaton, cycle
from .test_engine import alone, text_of

CODE = ("/retnet/serve/", "/retnet/models/decode/step.py")
GREEDY = Sampling(temperature=0)
ALTERNATING = Automaton((dict.fromkeys(range(0, VOCAB, 2), 1), dict.fromkeys(range(1, VOCAB, 2), 0)))
WATCHED = {"stop_strings": ["zzzz"]}
REQUESTS = [
    Request(prompt(19), 9, GREEDY, **WATCHED),
    Request(prompt(5, seed=1), 7, Sampling(seed=3, repetition_penalty=1.3), keep_state=True),
    Request(prompt(17), 5, GREEDY, shared=9, prefix_group="other"),
    Request(prompt(11, seed=2), 6, Sampling(seed=4, logprobs=2), grammar=ALTERNATING, prompt_logprobs=1),
    Request(prompt(19), 4, GREEDY),
    Request(prompt(3, seed=5), 8, GREEDY, grammar=cycle([5, 7]), counted=[1, 2]),
]
LATE = Request(prompt(19), 6, GREEDY)
OPTIONS = {
    "plain": {"prefix_cache_bytes": 10**6},
    "speculation": {"prefix_cache_bytes": 10**6, "speculation": Speculation(3)},
    "deferred writes": {"deferred_writes": 16},
}


def engine_of(model, **options) -> Engine:
    return Engine(model, num_slots=4, max_tokens=100, prompt_chunk=8, decode=text_of, **options)


@contextmanager
def breaking_off_at(number: int, error: BaseException) -> Iterator[list[tuple[str, int]]]:
    """Raise `error` at the line event of this number in the engine's code. Yields the lines of the events so far."""
    lines: list[tuple[str, int]] = []

    def trace_lines(frame: FrameType, event: str, _: object) -> Callable | None:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) == number:
                raise error
        return trace_lines

    def trace_calls(frame: FrameType, event: str, _: object) -> Callable | None:
        return trace_lines if any(part in frame.f_code.co_filename for part in CODE) else None

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        yield lines
    finally:
        sys.settrace(before)


def serve(engine: Engine) -> list:
    """All calls that work on states: submit, step, cancel, snapshot, fork."""
    generations = [engine.submit(request) for request in REQUESTS[:4]]
    for _ in range(3):
        engine.step()
    generations.append(engine.submit(REQUESTS[4]))
    generations.append(engine.submit(REQUESTS[5]))
    engine.cancel(generations[0])
    try:
        engine.fork(generations[1], Request([], 3))
    except ValueError:  # ended or failed
        engine.stats()
    engine.run()
    return generations


def break_off(model, options: dict, number: int, error: BaseException, expected: dict) -> None:
    """Break a run off at this line event, go on, and check every request."""
    engine, submitted, admit = engine_of(model, **options), [], Engine.submit

    def submit(self, request, after=None):
        generation = admit(self, request, after)
        submitted.append(generation)
        return generation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "submit", submit)
        with breaking_off_at(number, error) as lines, suppress(type(error)):
            serve(engine)
        where = f"broken off at line event {number}, {lines[-1]}"
        assert torch.is_grad_enabled(), where
        engine.run()
    assert engine.pool.num_free == engine.pool.num_slots, where
    for generation in submitted:
        assert generation.finished, where
        if generation.finish_reason == "failed":
            assert "broken off" in generation.error or "cannot be" in generation.error, where
        elif generation.request in expected:
            tokens = expected[generation.request]
            enough = len(generation.tokens) if generation.finish_reason == "cancelled" else len(tokens)
            assert generation.tokens == tokens[:enough], where
    late = engine.submit(LATE)
    engine.run()
    assert late.tokens == expected[LATE], where


def traced_run(model, options: dict) -> tuple[list[tuple[str, int]], dict[Request, list[int]]]:
    """The lines of a whole run, and the tokens that each request gets alone."""
    engine = engine_of(model, **options)
    with breaking_off_at(0, KeyboardInterrupt()) as lines:
        serve(engine)
    options = {"decode": text_of, "max_tokens": 100, **options}
    return lines, {request: alone(model, request, **options).tokens for request in [*REQUESTS, LATE]}


class Boom(Exception):
    pass


@pytest.mark.parametrize("options", OPTIONS)
def test_a_call_broken_off_at_any_line_leaves_other_requests_exact(options):
    model = small_model(dtype="float64")
    lines, expected = traced_run(model, OPTIONS[options])
    for i, number in enumerate(random.Random(0).sample(range(1, len(lines)), 5)):
        break_off(model, OPTIONS[options], number, KeyboardInterrupt() if i % 2 else Boom(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_a_call_broken_off_at_every_line_leaves_other_requests_exact(options):
    """At the first and one other time that each line of the code runs."""
    model = small_model(dtype="float64")
    lines, expected = traced_run(model, OPTIONS[options])
    numbers: dict[tuple[str, int], list[int]] = {}
    for number, line in enumerate(lines, 1):
        numbers.setdefault(line, []).append(number)
    rng = random.Random(0)
    for times in numbers.values():
        for number in {times[0], rng.choice(times)}:
            break_off(model, OPTIONS[options], number, KeyboardInterrupt(), expected)
