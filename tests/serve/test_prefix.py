"""The prefix cache: prompts read only the tokens after their longest cached prefix, and get the same bits."""

from array import array

import pytest

from retnet.models.decode.sampling import Sampling
from retnet.serve import prefix
from retnet.serve.prefix import PrefixCache
from retnet.serve.request import Request
from tests.small_models import prompt

from .test_engine import alone, engine_of, facts

SAMPLED = Sampling(temperature=0.8, seed=5, logprobs=2)


def test_a_repeated_prompt_needs_no_prefill_and_gives_the_same_bits(any_model):
    request = Request(prompt(30), 10, SAMPLED)
    engine = engine_of(any_model, prefix_cache_bytes=10**7)
    first = engine.submit(request)
    engine.run()
    read = engine.stats().prompt_tokens
    again = engine.submit(request)
    engine.run()
    assert facts(first) == facts(again) == facts(alone(any_model, request))
    assert engine.stats().prompt_tokens == read == 29
    assert again.cached == 29
    assert engine.stats().prefix.tokens_saved == 29


def test_a_shared_prefix_is_read_once(any_model):
    shared = prompt(21)
    engine = engine_of(any_model, prefix_cache_bytes=10**7)
    for seed in range(3):
        request = Request(shared + prompt(9, seed), 8, SAMPLED, shared=21)
        generation = engine.submit(request)
        engine.run()
        assert facts(generation) == facts(alone(any_model, request))
        assert generation.cached == (21 if seed else 0)
    assert engine.stats().prefix.hits == 2
    assert engine.stats().prefix.misses == {"the cache is empty": 1}


def test_states_inside_a_long_prompt_are_kept_at_chunk_boundaries(small):
    engine = engine_of(small, prefix_cache_bytes=10**7, prefix_interval=16)
    engine.submit(Request(prompt(60), 1))
    engine.run()
    request = Request([*prompt(60)[:40], 1, 2, 3], 8, SAMPLED)
    generation = engine.submit(request)
    engine.run()
    assert generation.cached == 32
    assert facts(generation) == facts(alone(small, request))


def test_the_next_turn_of_a_conversation_hits_the_prefix_cache(small):
    engine = engine_of(small, prefix_cache_bytes=10**7)
    first = engine.submit(Request(prompt(30), 10, SAMPLED))
    engine.run()
    second = engine.submit(Request(prompt(30) + first.tokens + [4, 5], 3, SAMPLED))
    engine.run()
    assert second.cached == 39, "all but the last token, which nothing had read"


def test_the_least_recently_used_state_is_dropped_first_and_misses_have_reasons(small):
    state = engine_of(small).pool.copy(0)
    cache = PrefixCache(2 * state.nbytes)
    a, b, c = (array("i", [n, n, n]) for n in range(3))
    assert cache.find(a) is None
    cache.store(a, state)
    cache.store(b, state)
    assert cache.find(array("i", [0, 0, 0, 9])) == (3, state)
    cache.store(c, state)
    assert cache.find(array("i", [1, 1, 1, 9])) is None
    assert cache.find(array("i", [1, 1])) is None
    assert cache.find(a) is not None
    assert dict(cache.counts.misses) == {
        "the cache is empty": 1,
        "the state was dropped to stay within the budget": 1,
        "no cached prompt begins with these tokens": 1,
    }
    assert (len(cache), cache.nbytes, cache.counts.evicted) == (2, 2 * state.nbytes, 1)


def test_the_longest_cached_prefix_is_used(small):
    state = engine_of(small).pool.copy(0)
    cache = PrefixCache(10**6)
    for length in (2, 5, 3):
        cache.store(array("i", range(length)), state)
    assert cache.find(array("i", range(9)))[0] == 5
    assert cache.find(array("i", range(4)))[0] == 3
    assert cache.find(array("i", [0, 7, 2])) is None


def test_a_state_larger_than_the_budget_is_not_kept(small):
    state = engine_of(small).pool.copy(0)
    cache = PrefixCache(state.nbytes - 1)
    cache.store(array("i", [1]), state)
    assert (len(cache), cache.counts.too_large) == (0, 1)
    with pytest.raises(ValueError, match="budget of 0 bytes"):
        PrefixCache(0)


def test_tokens_of_a_snapshot_are_no_cache_hit_and_shared_counts_from_the_prompt(small):
    engine = engine_of(small, prefix_cache_bytes=10**7)
    first = engine.submit(Request(prompt(30), 10, Sampling(temperature=0), keep_state=True))
    engine.run()
    before = engine.stats().prefix
    assert (before.hits, before.tokens_saved) == (0, 0)
    engine.submit(Request([3], 5, Sampling(temperature=0)), first.snapshot)
    engine.run()
    assert engine.stats().prefix.hits == 0
    assert before.stored < engine.stats().prefix.stored  # counts returned earlier do not change
    question = prompt(10, seed=4)
    for ending in (1, 2):
        twin = engine.submit(Request([*question, *[ending] * 9], 3, shared=10), first.snapshot)
        engine.run()
    assert twin.cached == 11  # the snapshot's last token is still to be read
    assert engine.stats().prefix.tokens_saved == 1 + 11  # the first of the two found what [3] left after that token


def test_the_tokens_that_are_remembered_stay_within_their_room(small, monkeypatch):
    monkeypatch.setattr(prefix, "TREE_BYTES", 30_000)
    state = engine_of(small).pool.copy(0)
    cache = PrefixCache(200 * state.nbytes)
    tokens = [array("i", [seed, *prompt(500, seed)]) for seed in range(40)]
    for each in tokens:
        cache.note(each)
        assert cache.tree.nbytes <= cache.tree_bytes
    cache.store(tokens[-1], state)
    assert cache.find(tokens[-1]) is not None
    for each in tokens:
        cache.store(each, state)
        cache.note(each)
        assert cache.tree.nbytes <= cache.tree_bytes
    assert cache.nbytes == len(cache) * state.nbytes
    assert len(cache) == sum(cache.longest(each) == len(each) for each in tokens) > 3
    long = array("i", prompt(2000))
    cache.note(long)
    cache.store(long, state)
    assert (cache.longest(long), cache.counts.too_large) == (0, 1)
