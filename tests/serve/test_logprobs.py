"""Log-probabilities of prompts: those of one full forward, however the prompt is cut, cached or continued."""

from types import SimpleNamespace

import pytest
import torch

from retnet.models.decode import fused
from retnet.models.decode.sampling import Sampling
from retnet.ops import device
from retnet.serve import logprobs
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from tests.small_models import prompt, small_model

from .test_engine import GREEDY, alone, engine_of, facts

STACKS = ["retention", "gated", "convolution", "hybrid", "experts"]


@torch.no_grad()
def expected(model, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [T - 1, vocab] after each token but the last."""
    return model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)


def check(model, generation, context: list[int], num_top: int, within: float) -> None:
    """context: the tokens before the prompt."""
    ids = list(generation.request.prompt)
    rows = expected(model, [*context, *ids])[-len(ids) :] if context else expected(model, ids)
    reported = generation.prompt_logprobs
    assert len(reported) == len(ids)
    if not context:
        assert reported.pop(0) is None
        ids.pop(0)
    for token, row, found in zip(ids, rows, reported, strict=True):
        assert found.logprob == pytest.approx(float(row[token]), abs=within)
        values = list(found.top.values())
        assert values == pytest.approx(row.sort(descending=True).values[:num_top].tolist(), abs=within)
        assert values == pytest.approx(row[list(found.top)].tolist(), abs=within)
        assert len(values) == num_top


@pytest.mark.parametrize("stack", STACKS)
def test_each_token_of_a_prompt_has_the_log_probability_of_a_full_forward(stack, monkeypatch):
    """Requests of one batch ask for different numbers of likely tokens, and every length asks for each in turn."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 61 * 3)
    model = small_model(stack, dtype="float64")
    for i, options in enumerate(({}, {"speculation": Speculation(3)}, {"deferred_writes": 16})):
        engine = engine_of(model, **options)
        asked = {n: (0, 1, 20)[(i + j) % 3] for j, n in enumerate((1, 2, 9, 21))}
        generations = [engine.submit(Request(prompt(n, n), 4, GREEDY, prompt_logprobs=k)) for n, k in asked.items()]
        engine.run()
        for generation, num_top in zip(generations, asked.values(), strict=True):
            check(model, generation, [], num_top, 1e-10)


@pytest.mark.parametrize("stack", ["retention", "gated", "convolution"])
def test_prompts_that_the_fused_blocks_read_have_the_same_values(stack, monkeypatch):
    """As on a GPU, with the operators of a CPU."""
    model, read = small_model(stack), fused.FusedBlock.read
    whole = all(fused.FusedBlock.supports(block) for block in model.layers)
    calls = []
    on_gpu = SimpleNamespace(uses_kernels=lambda x: True, current_device_of=device.current_device_of)
    monkeypatch.setattr(fused, "device", on_gpu)
    monkeypatch.setattr(fused.FusedBlock, "read", lambda *args: calls.append(1) or read(*args))
    generation = alone(model, Request(prompt(21), 0, prompt_logprobs=2))
    assert bool(calls) == whole == (stack != "convolution")
    check(model, generation, [], 2, 1e-5)


def test_in_float32_the_values_are_those_of_the_tokens_that_are_sampled_next(any_model):
    """The value of a token is the same whether it was given or sampled, up to rounding."""
    sampled = alone(any_model, Request(prompt(13), 12, GREEDY))
    given = alone(any_model, Request([*prompt(13), *sampled.tokens], 0, prompt_logprobs=3))
    for one, other in zip(sampled.logprobs, given.prompt_logprobs[13:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-5)
        assert one.top == pytest.approx(other.top, abs=2e-5)


def test_asking_for_log_probabilities_changes_no_token(any_model):
    request = Request(prompt(21), 9, Sampling(temperature=0.7, seed=1, logprobs=2))
    asked = Request(prompt(21), 9, Sampling(temperature=0.7, seed=1, logprobs=2), prompt_logprobs=1)
    assert facts(alone(any_model, request)) == facts(alone(any_model, asked))
    assert alone(any_model, request).prompt_logprobs == []


@pytest.mark.parametrize("at_once", [False, True])
def test_cached_prefixes_leave_no_token_of_a_prompt_without_its_value(at_once):
    model = small_model(dtype="float64")
    engine = engine_of(model, prefix_cache_bytes=10**7)
    shared = prompt(50, 9)
    for round_ in range(2):
        asked, plain = [], []
        for wanted, generations in ((2, asked), (None, plain)):
            for n in range(2):
                ids = [*shared, *prompt(9, n + 10 * round_)]
                generations.append(engine.submit(Request(ids, 3, GREEDY, prompt_logprobs=wanted)))
                if not at_once:
                    engine.run()
        engine.run()
        for generation in asked:
            assert generation.cached == 0
            assert generation.prefix_miss.startswith("log-probabilities of the prompt are asked for")
            check(model, generation, [], 2, 1e-10)
        assert all(g.tokens == p.tokens for g, p in zip(asked, plain, strict=True))
    assert all(g.cached >= 48 for g in plain), "they continue from states that the others left"


def test_a_prompt_after_a_snapshot_has_a_value_for_its_first_token_too():
    model = small_model("hybrid", dtype="float64")
    engine = engine_of(model, prefix_cache_bytes=10**7)
    first = engine.submit(Request(prompt(11), 4, GREEDY, keep_state=True))
    engine.run()
    context = [*prompt(11), *first.tokens]
    for length in (1, 2, 12):
        generation = engine.submit(Request(prompt(length, 4), 1, GREEDY, prompt_logprobs=3), first.snapshot)
        engine.run()
        check(model, generation, context, 3, 1e-10)
    nothing = engine.submit(Request([], 1, GREEDY, prompt_logprobs=3), first.snapshot)
    engine.run()
    assert nothing.prompt_logprobs == []


@pytest.mark.parametrize("options", [{}, {"speculation": Speculation(3)}, {"prefix_cache_bytes": 10**7}], ids=str)
def test_requests_for_no_tokens_end_after_their_prompts(any_model, options):
    engine = engine_of(any_model, **options)
    lengths = (1, 2, 8, 9, 30)
    running = engine.submit(Request(prompt(5), 12, GREEDY))
    ended = [engine.submit(Request(prompt(n), 0, GREEDY, keep_state=True, prompt_logprobs=0)) for n in lengths]
    engine.run()
    assert facts(running) == facts(alone(any_model, Request(prompt(5), 12, GREEDY), **options))
    for length, generation in zip(lengths, ended, strict=True):
        assert (generation.tokens, generation.finish_reason, generation.error) == ([], "length", None)
        assert len(generation.prompt_logprobs) == length
    after = [engine.submit(Request([], 6, GREEDY), generation.snapshot) for generation in ended]
    engine.run()
    for length, generation in zip(lengths, after, strict=True):
        assert facts(generation) == facts(alone(any_model, Request(prompt(length), 6, GREEDY), **options))
    assert engine.pool.num_free == engine.pool.num_slots


def test_a_request_for_no_tokens_after_a_snapshot_ends_too(small):
    engine = engine_of(small)
    first = engine.submit(Request(prompt(11), 0, GREEDY, keep_state=True))
    engine.run()
    again = engine.submit(Request([], 0, GREEDY, keep_state=True), first.snapshot)
    engine.run()
    assert (again.tokens, again.finish_reason) == ([], "length")
    assert list(again.snapshot.tokens) == prompt(11)


@pytest.mark.parametrize("stack", ["retention", "both decays"])
def test_a_prompt_whose_logits_are_not_finite_fails_alone(stack):
    model = small_model(stack, dtype="float64")
    with torch.no_grad():
        model.embedding.weight[60, 3] = float("nan")
    good = [token % 60 for token in prompt(12)]
    bad = [*good[:6], 60, *good[6:]]
    engine = engine_of(model)
    fine = engine.submit(Request(good, 3, GREEDY, prompt_logprobs=1))
    scored = engine.submit(Request(bad, 0, GREEDY, prompt_logprobs=1))
    kept = engine.submit(Request(bad, 0, GREEDY, keep_state=True))
    engine.run()
    assert fine.finish_reason == "length"
    assert scored.finish_reason == "failed"
    assert "logits of the prompt are not finite" in scored.error or "cannot be read" in scored.error
    assert kept.finish_reason == "failed"
    assert kept.snapshot is None
