"""Prefix groups: prompts share states with prompts of their own group alone, within one budget for all groups."""

import random
from array import array

import pytest

from retnet.serve import prefix
from retnet.serve.prefix import PrefixCache
from retnet.serve.radix import RadixTree
from retnet.serve.request import Request
from tests.models.test_initial_state import start_of
from tests.small_models import VOCAB, prompt

from .test_engine import GREEDY, alone, engine_of, facts
from .test_prefix_branches import PARTED, default_engine, group

NO_GROUP = "the request has no prefix group"


def submitted(engine, prompts, groups, *, at_once: bool) -> list:
    generations = []
    for ids, name in zip(prompts, groups, strict=True):
        generations.append(engine.submit(Request(ids, 3, GREEDY, prefix_group=name)))
        if not at_once:
            engine.run()
    engine.run()
    return generations


@pytest.mark.parametrize("at_once", [False, True])
def test_equal_prompts_of_other_groups_share_nothing(small, at_once):
    groups = ["a", "b", "", None, "a", "b", "", None]
    engine = default_engine(small, num_slots=8)
    generations = submitted(engine, [prompt(100)] * 8, groups, at_once=at_once)
    assert [g.cached for g in generations] == [0, 0, 0, 0, 99, 99, 99, 0]
    empty = "the cache is empty"
    assert [g.prefix_miss for g in generations] == [empty, empty, empty, NO_GROUP, None, None, None, NO_GROUP]
    options = {"num_slots": 8, "prefix_cache_bytes": None}
    [plain] = submitted(default_engine(small, **options), [prompt(100)], [""], at_once=True)
    expected = facts(plain)
    assert {repr(facts(g)) for g in generations} == {repr(expected)}
    counts = engine.stats().prefix
    assert (counts.hits, counts.misses) == (3, {empty: 3})
    assert counts.groups == 3


def test_prompts_wait_for_those_of_their_own_group_alone(small):
    ids = group(4, 160, 220)
    engine = engine_of(small, prefix_cache_bytes=10**7, max_tokens=300)
    names = ["a", "b", None, "a"]
    generations = [engine.submit(Request(each, 3, GREEDY, prefix_group=name)) for each, name in zip(ids, names)]
    for _ in range(8):
        engine.step()
    assert [g.awaited is not None for g in generations] == [False, False, False, True]
    assert all(g.read > 0 for g in generations[:3])
    engine.run()
    assert [g.cached for g in generations] == [0, 0, 0, 160]
    expected = [facts(alone(small, g.request, max_tokens=300)) for g in generations]
    assert [facts(g) for g in generations] == expected


def test_prompts_without_a_group_leave_nothing_in_the_cache(small):
    engine = default_engine(small, prefix_interval=256)
    submitted(engine, group(4, 160, 300), [None] * 4, at_once=True)
    counts = engine.stats().prefix
    assert (counts.stored, counts.groups, counts.token_bytes, counts.prompt_tokens) == (0, 0, 0, 0)
    [generation] = submitted(engine, [prompt(160, 99)], [""], at_once=True)
    assert (generation.cached, generation.prefix_miss) == (0, "the cache is empty")


def test_a_prompt_says_why_no_more_of_it_was_cached(small):
    engine = default_engine(small)
    first, second, third, fourth = submitted(engine, group(4, 160, 220), [""] * 4, at_once=False)
    assert (first.prefix_miss, second.prefix_miss) == ("the cache is empty", PARTED)
    assert (third.cached, third.prefix_miss) == (128, "fewer than 32 more tokens in common with another prompt")
    [again] = submitted(engine, [first.request.prompt], [""], at_once=True)
    assert (again.cached, again.prefix_miss) == (219, None)
    *read, last = fourth.request.prompt
    [longer] = submitted(engine, [[*read, (last + 1) % VOCAB, *prompt(40, 7)]], [""], at_once=True)
    assert (longer.cached, longer.prefix_miss) == (219, "no cached prompt has more of these tokens")
    [plain] = submitted(engine_of(small), [prompt(9)], [""], at_once=True)
    assert plain.prefix_miss == "the engine has no prefix cache"
    [one] = submitted(engine_of(small), [prompt(1)], [None], at_once=True)
    assert one.prefix_miss is None, "there was nothing to read"


def test_ten_thousand_groups_stay_within_the_budget(small, monkeypatch):
    monkeypatch.setattr(prefix, "TREE_BYTES", 2**20)
    state = engine_of(small).pool.copy(0)
    cache = PrefixCache(50 * state.nbytes)
    for number in range(10_000):
        tokens, name = array("i", range(40)), f"key {number}"
        assert cache.find(tokens, group=name) is None
        cache.note(tokens, name)
        cache.store(tokens, state, group=name)
        assert cache.tree.nbytes <= cache.tree_bytes
    assert (len(cache), cache.counts.states, cache.nbytes) == (50, 50, 50 * state.nbytes)
    assert cache.counts.groups == len(cache.tree.roots) < 2000
    assert cache.counts.token_bytes == cache.tree.nbytes
    assert cache._groups <= cache.tree.roots.keys()
    assert cache.find(tokens, group=name) == (40, state)
    assert cache.find(tokens, group="key 9949") is None
    assert cache.why_not_longer(tokens, group="key 9949") == "the state was dropped to stay within the budget"
    assert cache.why_not_longer(tokens, group="key 0") == "the cache is empty"
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_group_of_a_tree_is_like_a_tree_of_its_own():
    rng, common, own = random.Random(3), RadixTree(), {name: RadixTree() for name in "abc"}
    for number in range(600):
        name, tokens = rng.choice("abc"), array("i", rng.choices(range(3), k=rng.randint(1, 9)))
        common.insert(tokens, name)
        own[name].insert(tokens)
        query = array("i", rng.choices(range(3), k=9))
        for group_name, tree in own.items():
            found, expected = common.path(query, group_name), tree.path(query)
            assert [(n.end, n.tokens, len(n.children)) for n in found] == [
                (n.end, n.tokens, len(n.children)) for n in expected
            ]
            assert common.shared(query, group_name) == tree.shared(query)
        if number % 100 == 99:
            assert common.nbytes == sum(tree.nbytes + 4 for tree in own.values() if tree.roots)
            for tree in (common, *own.values()):
                tree.prune(0)
            assert (common.nbytes, common.roots) == (0, {})


def test_prompts_share_prefixes_only_after_the_same_initial_state(small):
    starts = [None, *(start_of(small, seed=seed) for seed in (0, 1)), start_of(small, scale=0.0)]
    engine, ids = default_engine(small), prompt(100)
    found = []
    for start in [*starts, *starts]:
        after, rest = (None, ids) if start is None else start.begin_of(ids)
        found.append(engine.submit(Request(rest, 3, GREEDY), after))
        engine.run()
    assert [g.cached for g in found] == [0, 0, 0, 99, 99, 99, 99, 99]  # a state of zeros is the empty one
    assert len({repr(g.logprobs) for g in found[:3]}) == 3
    assert [facts(g) for g in found[4:]] == [facts(g) for g in found[:4]]
