"""Speculative decoding: draft tokens change the speed and not the output."""

import tracemalloc
from array import array

import pytest
import torch

from retnet.models.decode.sampling import Sampling, mask_words
from retnet.serve.lookup import PromptLookup
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from tests.small_models import MTP, VOCAB, prompt, random_ids, small_model

from .test_engine import alone, engine_of, facts, text_of

GREEDY = Sampling(temperature=0)
REPEATING = prompt(7) * 5


@pytest.fixture(params=["retention", "gated", "hybrid"], scope="module")
def exact_model(request):
    """In float64, because a step of several tokens rounds differently from a step of one."""
    return small_model(request.param, dtype="float64")


SAMPLED = Sampling(temperature=0.5, seed=3, frequency_penalty=0.2)


@pytest.mark.parametrize(
    ("exact_model", "sampling"),
    [
        *((stack, sampling) for stack in ("retention", "gated") for sampling in (GREEDY, SAMPLED)),
        ("hybrid", SAMPLED),
        pytest.param("hybrid", GREEDY, marks=pytest.mark.slow),
    ],
    indirect=["exact_model"],
)
def test_output_is_that_of_plain_decoding_token_for_token(exact_model, sampling):
    plain, *drafting = (engine_of(exact_model, speculation=s) for s in (None, Speculation(3), Speculation(7)))
    outputs = []
    for engine in (plain, *drafting):
        generations = [engine.submit(Request(ids, 16, sampling)) for ids in (REPEATING, prompt(1), prompt(20))]
        engine.run()
        outputs.append([generation.tokens for generation in generations])
    assert outputs[1] == outputs[2] == outputs[0]
    assert all(engine.stats().drafted for engine in drafting)


def test_drafts_are_accepted_where_text_repeats_itself(small):
    engine = engine_of(small, speculation=Speculation(3), max_tokens=None)
    biased = Sampling(temperature=0, logit_bias={5: 1e4})
    engine.submit(Request(prompt(8), 60, biased))
    engine.run()
    stats = engine.stats()
    assert stats.accepted >= 40
    assert stats.steps < 30
    assert stats.drafted >= stats.accepted


def test_other_requests_change_no_bit_of_a_request(any_model):
    options = {"speculation": Speculation(3)}
    request = Request(REPEATING, 15, Sampling(temperature=0.6, seed=4, logprobs=3))
    expected = facts(alone(any_model, request, **options))
    engine = engine_of(any_model, **options)
    others = [engine.submit(Request(prompt(5 + n, n) * 2, 10 + n, Sampling(seed=n))) for n in range(3)]
    engine.step()
    generation = engine.submit(request)
    others += [engine.submit(Request(prompt(3) * 4, 12, GREEDY)) for _ in range(4)]
    engine.run()
    assert facts(generation) == expected
    assert all(other.num_new == other.request.max_new_tokens for other in others)


def test_a_snapshot_after_a_stop_inside_a_draft_continues_like_plain_decoding(exact_model):
    biased = Sampling(temperature=0, logit_bias={5: 1e4})
    string = text_of([5, 5, 5, 5, 5, 5])
    options = {"speculation": Speculation(7), "decode": text_of}
    stopped = alone(exact_model, Request(prompt(9), 40, biased, stop_strings=[string], keep_state=True), **options)
    assert (stopped.finish_reason, stopped.tokens) == ("stop_string", [5] * 6)
    assert int(stopped.snapshot.state.position) == 9 + 6 - 1
    engine = engine_of(exact_model)
    after = engine.submit(Request([], 12, GREEDY), stopped.snapshot)
    engine.run()
    assert after.tokens == alone(exact_model, Request(prompt(9) + [5] * 6, 12, GREEDY)).tokens


@pytest.mark.parametrize("source", ["context", pytest.param("mtp", marks=pytest.mark.slow)])
def test_sampled_output_has_the_distribution_of_plain_decoding(source):
    """Two tokens after a prompt whose continuation is drafted: frequencies over seeds against exact probabilities."""
    small = small_model(mtp=MTP)
    draws, sampling = 480, {"temperature": 0.7, "top_k": 3}
    ids = [*prompt(6), 9, *prompt(6)]
    engine = engine_of(
        small, num_slots=60, prompt_chunk=16, prompt_budget=480, speculation=Speculation(3, source=source)
    )
    generations = [engine.submit(Request(ids, 2, Sampling(seed=1000 + n, **sampling))) for n in range(draws)]
    engine.run()
    assert engine.stats().drafted >= draws
    counts = torch.zeros(61, 61)
    for generation in generations:
        counts[tuple(generation.tokens)] += 1

    def next_token(tokens) -> torch.Tensor:
        with torch.no_grad():
            logits = small(torch.tensor([tokens])).logits[0, -1] / 0.7
        kept = logits.topk(3)
        return torch.zeros(61).index_copy(0, kept.indices, kept.values.softmax(-1))

    first = next_token(ids)
    expected = torch.stack([p * next_token([*ids, t]) if p > 0 else torch.zeros(61) for t, p in enumerate(first)])
    likely = expected * draws >= 5
    statistic = float(((counts - draws * expected) ** 2 / (draws * expected))[likely].sum())
    assert counts[expected == 0].sum() == 0
    assert statistic < 26.1, "chi-square, at most 8 degrees of freedom, p = 0.001"


def test_lookup_finds_the_latest_continuation_of_the_longest_matching_ending():
    lookup = PromptLookup(longest=3)
    assert lookup.draft([1, 2, 3], 4) == []
    assert lookup.draft([1, 2, 3, 9, 2, 3], 4) == [9, 2, 3, 9]
    assert lookup.draft([1, 2, 3, 9, 2, 3, 8, 3, 9, 2], 2) == [3, 8]
    assert lookup.draft([1, 2, 3, 9, 2, 3, 8, 3, 9, 2, 3, 7, 2, 3], 3) == [7, 2, 3]


def test_drafts_that_a_cache_cannot_take_are_refused_by_name():
    with pytest.raises(ValueError, match="layer 1 is attention, which keeps 9 tokens; accepted with draft_tokens 19"):
        engine_of(small_model("hybrid"), speculation=Speculation(19))
    with pytest.raises(ValueError, match="draft_tokens is 4; accepted: 3, 7, 11"):
        Speculation(4)


def test_a_long_prompt_is_indexed_as_it_is_read_and_forgotten_with_its_request(small):
    engine = engine_of(small, speculation=Speculation(3), prompt_chunk=8)
    generation = engine.submit(Request(prompt(60), 5, Sampling(temperature=0)))
    indexed = []
    while not generation.tokens:
        engine.step()
        indexed.append(engine.drafter.lookups[generation.slot].num_indexed)
    assert indexed == sorted(indexed)
    assert max(after - before for before, after in zip([0, *indexed], indexed)) <= 9
    engine.run()
    drafted = engine.stats().drafted
    assert drafted > 0
    engine.submit(Request([1], 1, Sampling(temperature=0)))
    engine.step()
    assert engine.drafter.lookups[0].num_indexed == 0


def test_the_index_takes_fixed_memory_that_the_slot_cost_counts(small):
    """Whatever the length of the context, and however many contexts a slot has had."""
    plain, drafting = (engine_of(small, max_tokens=None, speculation=s) for s in (None, Speculation(3)))
    assert plain.pool.cost.index == 0
    assert drafting.pool.cost.index == drafting.drafter.lookups[0].nbytes
    masks = 3 * 4 * mask_words(VOCAB)  # one for each draft token
    sampling = plain.pool.cost.sampling + masks
    assert drafting.pool.cost.total == drafting.pool.cost.state + sampling + drafting.pool.cost.index
    seen = array("i", random_ids(4000, high=5000).tolist())
    tracemalloc.start()
    try:
        for start in (0, 1, 2):
            drafting.drafter.enter(0)
            drafting.drafter.index(0, seen[start:], len(seen) - start)
            if not start:
                before = tracemalloc.get_traced_memory()[0]
        assert tracemalloc.get_traced_memory()[0] - before < 4096
    finally:
        tracemalloc.stop()
    assert engine_of(small, max_tokens=32, speculation=Speculation(3)).pool.cost.index < drafting.pool.cost.index / 100


@pytest.mark.parametrize("entries", [8, 4096])
def test_a_draft_follows_an_earlier_place_of_the_same_tokens_however_small_the_index(entries):
    lookup, seen, found = PromptLookup(3, entries), random_ids(600, high=6).tolist(), 0
    for length in range(1, len(seen)):
        context = seen[:length]
        draft = lookup.draft(context, 1)
        places = [
            end for n in (3, 2, 1) for end in range(length - 1, n - 1, -1) if context[end - n : end] == context[-n:]
        ]
        allowed = [context[end] for end in places]
        assert draft[0] in allowed if draft else entries < 4096 or not places
        found += bool(draft) and draft[0] == allowed[0]
    assert found > (50 if entries < 4096 else 590)


def test_updates_of_drafts_are_kept_for_the_last_step_alone(small):
    engine = engine_of(small, speculation=Speculation(3))
    for sampling in (GREEDY, Sampling(), Sampling(top_k=3), Sampling(logprobs=1), Sampling(presence_penalty=1.0)):
        engine.submit(Request(prompt(5), 6, sampling))
        engine.run()
        assert len(engine._step._updates) == 1
