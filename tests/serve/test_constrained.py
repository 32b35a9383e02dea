"""Outputs under a grammar: masks before sampling, drafts cut by the grammar, failures of one request alone."""

import random
from dataclasses import replace

import pytest
import torch

from retnet.models.decode.sampling import Sampling, SamplingParts, SamplingTable, mask_words
from retnet.serve.constrained import ConstrainedOutput
from retnet.serve.request import Refused, Request
from retnet.serve.speculation import Speculation
from tests.small_models import VOCAB, prompt, small_model

from .automaton import Automaton, cycle, random_automaton, sequence
from .test_engine import alone, engine_of, facts

GREEDY = Sampling(temperature=0, logprobs=2)
OPTIONS = {"plain": {}, "speculation": {"speculation": Speculation(3)}, "deferred writes": {"deferred_writes": 16}}
EOS = 7


def follows(grammar: Automaton, tokens: list[int]) -> bool:
    return all(token in grammar.allowed(tokens[:i]) for i, token in enumerate(tokens))


@pytest.mark.parametrize(
    ("stack", "options"),
    [
        *(("retention", name) for name in OPTIONS),
        ("hybrid", "speculation"),
        *(pytest.param("hybrid", name, marks=pytest.mark.slow) for name in OPTIONS if name != "speculation"),
    ],
)
def test_outputs_follow_their_grammar_and_end_with_it(stack, options):
    rng, engine = random.Random(1), engine_of(small_model(stack), **OPTIONS[options])
    samplings = [GREEDY, Sampling(temperature=1.3, seed=2), Sampling(seed=3, top_k=2, min_p=0.1)]
    grammars = [random_automaton(rng, VOCAB) for _ in range(15)]
    requests = [Request(prompt(5 + n, n), 15, samplings[n % 3], grammar=grammar) for n, grammar in enumerate(grammars)]
    generations = [engine.submit(request) for request in requests]
    engine.run()
    reasons = set()
    for generation, grammar in zip(generations, grammars, strict=True):
        assert generation.error is None
        assert follows(grammar, generation.tokens)
        ended = grammar.ends(generation.tokens)
        assert generation.finish_reason == ("grammar_end" if ended else "length")
        reasons.add(generation.finish_reason)
    assert reasons == {"grammar_end", "length"}
    assert engine.pool.num_free == engine.pool.num_slots


@pytest.mark.parametrize(("stack", "options"), [*(("retention", name) for name in OPTIONS), ("hybrid", "speculation")])
def test_requests_without_a_grammar_keep_their_bits_beside_those_that_have_one(stack, options):
    requests = [
        Request(prompt(9), 12, GREEDY),
        Request(prompt(7, 1), 12, Sampling(temperature=0.8, seed=4)),
        Request(prompt(8, 2), 12, Sampling(seed=5, top_p=0.8, repetition_penalty=1.2, logprobs=3)),
    ]
    model = small_model(stack)
    expected = [facts(alone(model, request, **OPTIONS[options])) for request in requests]
    engine = engine_of(model, **OPTIONS[options])
    constrained = engine.submit(Request(prompt(5, 3), 20, GREEDY, grammar=cycle([3, 60, 31, 32])))
    engine.step()
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [facts(generation) for generation in generations] == expected
    assert constrained.tokens == [3, 60, 31, 32] * 5


@pytest.mark.parametrize(
    ("stack", "times"),
    [
        ("retention", 1),
        pytest.param("gated", 8, marks=pytest.mark.slow),
        pytest.param("hybrid", 8, marks=pytest.mark.slow),
    ],
)
def test_drafts_change_no_token_under_a_grammar(stack, times):
    """In float64, because a step of several tokens rounds differently. Cycles make drafts that are right."""
    model, rng = small_model(stack, dtype="float64", eos_token_id=EOS), random.Random(7)
    grammars = [random_automaton(rng, VOCAB, eos=EOS, num_states=n) for n in (2, 3, 4, 6) for _ in range(times)]
    grammars += [cycle(prompt(3)), sequence(prompt(20)[:6] * 3), None]
    samplings = [GREEDY, Sampling(temperature=0.9, seed=1), Sampling(seed=2, top_k=3, frequency_penalty=0.4)]
    outputs = []
    for speculation in (None, Speculation(3), Speculation(7)):
        engine = engine_of(model, speculation=speculation)
        generations = [
            engine.submit(Request(prompt(5, n) * 2, 18, sampling, grammar=grammar, ignore_eos=n % 2 == 0))
            for n, grammar in enumerate(grammars)
            for sampling in samplings
        ]
        engine.run()
        outputs.append([(g.tokens, g.finish_reason, g.error) for g in generations])
        stats = engine.stats()
        assert speculation is None or stats.drafted > stats.accepted > 40
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]
    assert {reason for _, reason, _ in outputs[0]} == {"grammar_end", "length", "stop_token"}


def test_a_draft_is_cut_where_the_grammar_refuses_it_and_taken_back_where_it_is_rejected():
    output = ConstrainedOutput(cycle([1, 2, 3]), VOCAB, [])
    masks = torch.full((4, mask_words(VOCAB)), -1, dtype=torch.int32)
    assert output.fill(masks, [1, 2, 9]) == [1, 2]
    assert [mask.tolist() for mask in masks] == [[2, 0], [4, 0], [8, 0], [-1, -1]]
    matcher = output._matcher
    assert matcher.tokens == [1, 2]
    output.push(1)  # as drafted
    assert matcher.tokens == [1, 2]
    assert output.fill(masks, []) == []  # the rest of the draft was not reached
    assert matcher.tokens == [1]
    assert masks[0].tolist() == [4, 0]
    assert output.fill(masks, [2, 3, 1]) == [2, 3, 1]
    output.push(2)
    output.push(3)
    output.push(1)
    output.push(2)  # sampled after the draft
    assert matcher.tokens == [1, 2, 3, 1, 2]
    assert [call for call in matcher.calls if call[0] == "rollback"] == [("rollback", 1)]
    ending = ConstrainedOutput(sequence([5, 6]), VOCAB, [])
    assert ending.fill(masks, [5, 6, 5]) == [5, 6]
    assert not ending.ended
    ending.push(5)
    assert not ending.ended
    ending.push(6)
    assert ending.ended


def test_a_draft_into_a_dead_end_is_cut_before_it():
    dead_end = Automaton(({1: 1, 2: 0}, {3: 2}, {4: 3}, {}), frozenset())
    output = ConstrainedOutput(dead_end, VOCAB, banned=[4])
    masks = torch.full((4, mask_words(VOCAB)), -1, dtype=torch.int32)
    assert output.fill(masks, [2, 1, 3]) == [2, 1]
    assert output._matcher.tokens == [2, 1]


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 61, 64, 100])
@pytest.mark.parametrize("greedy", [True, False])
def test_each_row_of_a_table_has_its_own_mask(vocab_size, greedy):
    table = SamplingTable(4, vocab_size, torch.device("cpu"), width=2)
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rng = random.Random(vocab_size)
    for slot in range(4):
        table.fill(slot, Sampling(temperature=0 if greedy else 1.0), slot, torch.tensor([1]), torch.tensor([]))
    plain = table.sample(logits, torch.arange(4), SamplingParts(draws=not greedy)).tokens
    allowed = {slot: set(rng.sample(range(vocab_size), k)) | {vocab_size - 1} for slot, k in ((1, 1), (3, 9))}
    for slot, tokens in allowed.items():
        output = ConstrainedOutput(Automaton((dict.fromkeys(tokens, 0),)), vocab_size, [])
        output.fill(table.host_masks(slot)[1:], [])
    table.upload_masks(list(allowed))
    parts = SamplingParts(draws=not greedy, masks=True)
    assert table.sample(logits, torch.arange(4), parts).tokens.tolist() == plain.tolist()
    for position in range(30):
        masked = table.sample(logits, torch.full((4,), position), parts, 1).tokens
        unmasked = table.sample(logits, torch.full((4,), position), parts, 0).tokens
        for slot in range(4):
            if slot not in allowed:
                assert masked[slot] == unmasked[slot]
            elif greedy:
                assert int(masked[slot]) == max(allowed[slot], key=lambda token: float(logits[slot, token]))
            else:
                assert int(masked[slot]) in allowed[slot]
    table.fill(3, Sampling(), 0, torch.tensor([1]), torch.tensor([]))
    assert table.masks[3].tolist() == [[-1] * mask_words(vocab_size)] * 2


def test_log_probabilities_stay_those_of_the_model(any_model):
    generation = alone(any_model, Request(prompt(9), 6, GREEDY, grammar=cycle([5, 17, 40])))
    with torch.no_grad():
        rows = any_model(torch.tensor([[*prompt(9), *generation.tokens]])).logits[0, 8:-1].log_softmax(-1)
    for row, token, reported in zip(rows, generation.tokens, generation.logprobs, strict=True):
        assert reported.logprob == pytest.approx(float(row[token]), abs=2e-4)
        assert list(reported.top) == row.topk(2).indices.tolist()


@pytest.mark.parametrize("options", OPTIONS)
def test_every_combination_of_penalties_leaves_a_token_that_may_come(small, options):
    sampling = Sampling(
        temperature=1e-6, top_k=1, top_p=1e-6, min_p=1.0, repetition_penalty=1e6, presence_penalty=1e6,
        frequency_penalty=1e6, logit_bias={5: -1e30, **dict.fromkeys(range(6, VOCAB), -float("inf"))}, seed=1,
    )  # fmt: skip
    grammar = Automaton(({5: 0, 6: 0, 60: 0},))
    for temperature in (0, 1e-6, 1.0):
        request = Request(prompt(9), 6, replace(sampling, temperature=temperature), grammar=grammar)
        assert alone(small, request, **OPTIONS[options]).tokens == [5] * 6


@pytest.mark.parametrize("options", OPTIONS)
def test_a_grammar_that_allows_nothing_fails_its_request_alone_with_the_reason(small, options):
    banned = Sampling(temperature=0, logit_bias={3: -float("inf"), 4: -float("inf")})
    engine = engine_of(small, **OPTIONS[options])
    neighbour = engine.submit(Request(prompt(8), 15, GREEDY))
    dead_end = engine.submit(Request(prompt(5), 15, banned, grammar=Automaton(({1: 1}, {2: 2}, {3: 0, 4: 0}))))
    empty = engine.submit(Request(prompt(6), 15, GREEDY, grammar=Automaton(({1: 1}, {63: 0}), frozenset())))
    engine.run()
    assert (dead_end.tokens, dead_end.finish_reason) == ([1, 2], "failed")
    assert dead_end.error == "its grammar allows no token that logit_bias does not ban after those of the output"
    assert (empty.tokens, empty.finish_reason) == ([1], "failed")
    assert empty.error == "its grammar allows no token after those of the output"
    assert facts(neighbour) == facts(alone(small, neighbour.request, **OPTIONS[options]))
    assert engine.pool.num_free == engine.pool.num_slots


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("call", ["fill", "accept", "ended"])
def test_an_exception_of_a_matcher_fails_its_request_alone(small, call, options):
    options = {"prefix_cache_bytes": 10**7, **OPTIONS[options]}
    engine = engine_of(small, **options)
    broken = replace(cycle([1, 2]), broken={call: ValueError("a hiccup")})
    bad = engine.submit(Request(prompt(5, 9), 9, GREEDY, grammar=broken, keep_state=True))
    neighbours = [
        engine.submit(Request(prompt(8), 9, GREEDY)),
        engine.submit(Request(prompt(9, 1), 9, GREEDY, grammar=cycle([3, 4, 5]))),
    ]
    engine.run()
    assert (bad.tokens, bad.finish_reason, bad.snapshot) == ([], "failed", None)
    assert "a hiccup" in bad.error
    for generation in neighbours:
        assert facts(generation) == facts(alone(small, generation.request, **options))
    assert engine.pool.num_free == engine.pool.num_slots


def test_an_exception_in_a_rollback_fails_its_request_alone():
    model = small_model(dtype="float64")
    engine = engine_of(model, speculation=Speculation(3))
    any_token = Automaton((dict.fromkeys(range(VOCAB), 0),))
    requests = [Request(prompt(7, n) * 3, 20, Sampling(seed=n), grammar=any_token) for n in range(3)]
    requests[1] = replace(requests[1], grammar=replace(any_token, broken={"rollback": OSError("a hiccup")}))
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [g.finish_reason for g in generations] == ["length", "failed", "length"]
    assert "cannot go back by" in generations[1].error
    assert all(g.tokens == alone(model, g.request).tokens for g in generations[::2])


def test_a_matcher_that_refuses_what_its_mask_allows_fails_its_request(small):
    class Refusing(type(cycle([1]).matcher())):
        def accept(self, token: int) -> bool:
            return len(self.tokens) < 2 and super().accept(token)

    class Language(Automaton):
        def matcher(self) -> Refusing:
            return Refusing(self)

    generation = alone(small, Request(prompt(4), 9, GREEDY, grammar=Language(cycle([1, 2, 3]).edges)))
    assert (generation.tokens, generation.error) == ([1, 2], "its grammar refuses token 3")


@pytest.mark.parametrize("options", OPTIONS)
def test_an_output_that_must_be_empty_ends_after_the_prompt(small, options):
    engine = engine_of(small, **OPTIONS[options])
    for grammar in (sequence([]), Automaton(({},), frozenset([0]), last=(EOS,))):
        generation = engine.submit(Request(prompt(9), 5, GREEDY, grammar=grammar, keep_state=True))
        engine.run()
        assert (generation.tokens, generation.finish_reason) == ([], "grammar_end")
        assert list(generation.snapshot.tokens) == prompt(9)
    none_wanted = alone(small, Request(prompt(9), 0, GREEDY, grammar=cycle([1])), **OPTIONS[options])
    assert none_wanted.finish_reason == "length"


def test_a_grammar_without_a_matcher_is_refused(small):
    class Broken:
        def matcher(self):
            raise ValueError("a hiccup")

    with pytest.raises(Refused, match=r"the grammar has no matcher \(ValueError\('a hiccup'\)\); accepted"):
        engine_of(small).submit(Request([1], 5, grammar=Broken()))
    with pytest.raises(Refused, match=r"grammar is 'json'; accepted: a Grammar"):
        Request([1], 5, grammar="json")


@pytest.mark.parametrize("options", OPTIONS)
def test_snapshots_and_forks_go_on_under_a_grammar_of_their_own(options):
    """The grammar begins with the output of its request, and each request has a matcher of its own."""
    model = small_model("hybrid", dtype="float64")
    engine = engine_of(model, **OPTIONS[options])
    grammar = cycle([1, 2, 3])
    first = engine.submit(Request(prompt(9), 7, GREEDY, grammar=grammar, keep_state=True))
    while not first.tokens:
        engine.step()
    fork = engine.fork(first, Request([], 7, GREEDY, grammar=grammar))
    free = engine.fork(first, Request([], 7, GREEDY))
    engine.run()
    after = engine.submit(Request([4], 5, GREEDY, grammar=grammar), first.snapshot)
    engine.run()
    assert first.tokens == [1, 2, 3, 1, 2, 3, 1]
    assert fork.tokens == [1, 2, 3, 1, 2, 3, 1]
    assert after.tokens == [1, 2, 3, 1, 2]
    before = list(free.seen[: free.output_start])
    assert free.tokens == alone(model, Request(before, 7, GREEDY), **OPTIONS[options]).tokens


@pytest.mark.parametrize("options", OPTIONS)
def test_cancelled_requests_leave_no_mask_behind(small, options):
    engine = engine_of(small, num_slots=1, **OPTIONS[options])
    for steps in range(1, 5):
        constrained = engine.submit(Request(prompt(5), None if engine.pool.max_tokens is None else 50, GREEDY,
                                            grammar=cycle([1, 2])))  # fmt: skip
        waiting = engine.submit(Request(prompt(5), 50, GREEDY, grammar=cycle([1, 2])))
        for _ in range(steps):
            engine.step()
        engine.cancel(waiting)
        engine.cancel(constrained)
        assert (waiting.finish_reason, constrained.finish_reason) == ("cancelled", "cancelled")
        free = engine.submit(Request(prompt(6), 6, Sampling(temperature=0.9, seed=1)))
        other = engine.submit(Request(prompt(6), 6, GREEDY, grammar=cycle([9])))
        engine.run()
        assert facts(free) == facts(alone(small, free.request, num_slots=1, **OPTIONS[options]))
        assert other.tokens == [9] * 6


@pytest.mark.parametrize("options", OPTIONS)
def test_nan_under_a_grammar_fails_its_request_alone(options):
    model = small_model("hybrid", dtype="float64")
    with torch.no_grad():
        model.embedding.weight[60, 3] = float("nan")
    engine = engine_of(model, **OPTIONS[options])
    bad = engine.submit(Request([3, 60, 60], 12, GREEDY, grammar=cycle([1, 2])))
    later = engine.submit(Request([3, 4], 12, GREEDY, grammar=sequence([1, 2, 60, 3])))
    neighbours = [
        engine.submit(Request([t % 60 for t in prompt(9)], 9, Sampling(temperature=0, logit_bias={60: -1e9}))),
        engine.submit(Request([5, 6, 7], 9, GREEDY, grammar=cycle([3, 4, 5]))),
    ]
    engine.run()
    assert bad.finish_reason == later.finish_reason == "failed"
    assert (later.tokens, "not finite" in later.error) == ([1, 2, 60], True)
    for generation in neighbours:
        assert generation.finish_reason == "length"
        assert facts(generation) == facts(alone(model, generation.request, **OPTIONS[options]))
