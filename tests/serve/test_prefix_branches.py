"""States where prompts part: prompts that begin alike read their common beginning once, without being told of it."""

import pytest

from retnet.models.cost import model_cost
from retnet.models.presets import preset
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.radix import RadixTree
from retnet.serve.request import Request
from tests.small_models import prompt, small_model

from .test_engine import GREEDY, HYBRID_IS_SLOW, alone, engine_of, facts

PARTED = "a prompt began alike, but no state was kept where they part"


def default_engine(model, **options) -> Engine:
    return Engine(model, **{"num_slots": 4, "max_tokens": 1000, "prefix_cache_bytes": 10**8, **options})


def group(number: int, shared: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts that share their first tokens. What follows begins differently, so that no two share one more."""
    return [prompt(shared, 99 + seed) + [i] + prompt(length - shared - 1, i) for i in range(number)]


def send(engine: Engine, prompts, *, at_once: bool = False, new: int = 3) -> list:
    generations = []
    for ids in prompts:
        generations.append(engine.submit(Request(ids, new, GREEDY)))
        if not at_once:
            engine.run()
    engine.run()
    return generations


def hits(generations, least: int = 1) -> int:
    return sum(generation.cached >= least for generation in generations)


@pytest.mark.parametrize(("number", "shared", "length", "least"), [(16, 160, 220, 128), (24, 300, 410, 256)])
def test_prompts_sent_one_after_another_hit_where_they_part(small, number, shared, length, least):
    engine, prompts = default_engine(small), group(number, shared, length)
    generations = send(engine, prompts)
    assert [generation.cached for generation in generations] == [0, 0] + [least] * (number - 2)
    counts = engine.stats().prefix
    assert (counts.hits, dict(counts.misses)) == (number - 2, {"the cache is empty": 1, PARTED: 1})
    assert counts.prompt_tokens == number * (length - 1)
    assert counts.tokens_saved == counts.prompt_tokens - engine.stats().prompt_tokens == (number - 2) * least
    plain = default_engine(small, prefix_cache_bytes=None)
    assert [facts(g) for g in generations] == [facts(g) for g in send(plain, prompts)]


@pytest.mark.parametrize(
    ("number", "shared", "length", "least", "num_slots"),
    [(16, 160, 220, 128, 1), (16, 160, 220, 128, 16), (24, 300, 410, 256, 4)],
)
def test_prompts_sent_at_once_hit_where_they_part(small, number, shared, length, least, num_slots):
    engine, prompts = default_engine(small, num_slots=num_slots), group(number, shared, length)
    generations = send(engine, prompts, at_once=True)
    assert [generation.cached for generation in generations] == [0] + [least] * (number - 1)
    assert engine.stats().prefix.misses == {"the cache is empty": 1}
    assert engine.stats().prompt_tokens == least + number * (length - 1 - least)
    plain = default_engine(small, prefix_cache_bytes=None, num_slots=num_slots)
    assert [facts(g) for g in generations] == [facts(g) for g in send(plain, prompts)]


def test_hits_inside_prompts_change_no_bits_at_chunk_boundaries(any_model):
    prompts = group(5, 45, 70)
    expected = [facts(alone(any_model, Request(ids, 3, GREEDY))) for ids in prompts]
    for at_once in (False, True):
        engine = engine_of(any_model, prefix_cache_bytes=10**7)
        generations = send(engine, prompts, at_once=at_once)
        assert [facts(generation) for generation in generations] == expected
        assert hits(generations, 40) == (4 if at_once else 3)


@HYBRID_IS_SLOW
def test_prefixes_inside_prefixes_are_read_once(any_model):
    """A system prompt of 96 tokens, three tasks of 96 with their examples, four questions each."""
    system, tasks = prompt(96, 5), [[i, *prompt(95, i)] for i in range(3)]
    prompts = [system + task + [i, *prompt(9, i)] for i in range(4) for task in tasks]
    plain = send(default_engine(any_model, prefix_cache_bytes=None, num_slots=8), prompts)
    for at_once, cached in ((True, [0, *[96] * 2, *[192] * 9]), (False, [0, 0, *[96] * 4, *[192] * 6])):
        generations = send(default_engine(any_model, num_slots=8), prompts, at_once=at_once)
        assert sorted(g.cached for g in generations) == cached
        assert [g.tokens for g in generations] == [g.tokens for g in plain]


@pytest.mark.parametrize("room", [1, 2, 3])
def test_the_state_where_prompts_part_outlives_the_ends_of_prompts(small, room):
    """Every second prompt has nothing in common with the others, and each leaves two states."""
    size = engine_of(small).pool.copy(0).nbytes
    engine = default_engine(small, prefix_cache_bytes=room * size + 1)
    shared, others = group(8, 160, 220), [prompt(70, 500 + i) for i in range(8)]
    generations = send(engine, [ids for pair in zip(shared, others) for ids in pair])
    assert hits(generations[::2], 128) == 6
    assert engine.stats().prefix.state_bytes <= room * size


@pytest.mark.parametrize("at_once", [False, True])
def test_groups_of_prompts_in_turn_need_one_state_each(small, at_once):
    size = engine_of(small).pool.copy(0).nbytes
    engine = default_engine(small, prefix_cache_bytes=4 * size)
    groups = [group(6, 160, 220, seed) for seed in range(4)]
    generations = send(engine, [ids for turn in zip(*groups) for ids in turn], at_once=at_once)
    assert hits(generations, 128) == 4 * (5 if at_once else 4)


def test_a_state_out_of_use_makes_room_for_the_next_group(small):
    size = engine_of(small).pool.copy(0).nbytes
    engine = default_engine(small, prefix_cache_bytes=size)
    for seed in range(3):
        assert hits(send(engine, group(8, 160, 220, seed)), 128) == 6


def test_more_groups_than_the_cache_has_room_for_do_not_push_each_other_out(small):
    size = engine_of(small).pool.copy(0).nbytes
    engine = default_engine(small, prefix_cache_bytes=3 * size)
    groups = [group(5, 70, 80, seed) for seed in range(5)]
    generations = send(engine, [ids for turn in zip(*groups) for ids in turn], new=1)
    assert hits(generations, 64) >= 3 * 3


@pytest.mark.parametrize("room", [6, 10**3])
def test_conversations_in_turn_need_little_more_than_one_state_each(small, room):
    size = engine_of(small).pool.copy(0).nbytes
    engine = default_engine(small, prefix_cache_bytes=room * size)
    contexts = [prompt(40, seed) for seed in range(4)]
    for turn in range(3):
        generations = []
        for i, context in enumerate(contexts):
            generations += send(engine, [context], new=9)
            contexts[i] = [*context, *generations[-1].tokens, *prompt(30, 10 * turn + i)]
        earlier = [len(g.seen) - 9 - 30 - 1 for g in generations]  # all that was read in the turn before
        assert [g.cached for g in generations] == ([0] * 4 if turn == 0 else earlier)


def test_a_prompt_waits_only_while_the_prompt_that_it_shares_with_is_read(small):
    ids = group(3, 160, 220)
    expected = [facts(alone(small, Request(each, 3, GREEDY), max_tokens=300)) for each in ids]
    engine = engine_of(small, prefix_cache_bytes=10**7, max_tokens=300)
    first, second, third = (engine.submit(Request(each, 3, GREEDY)) for each in ids)
    for _ in range(5):
        engine.step()
    assert (first.read, second.read, third.read) == (40, 0, 0)
    engine.cancel(first)
    for _ in range(5):
        engine.step()
    assert (second.read, third.read) == (40, 0)
    engine.run()
    assert (second.cached, third.cached) == (0, 160)
    assert [facts(second), facts(third)] == expected[1:]


def test_short_prompts_do_not_wait_for_long_ones_with_another_beginning(small):
    engine = engine_of(small, prefix_cache_bytes=10**7)
    long, short = (engine.submit(Request(prompt(n, n), 5, GREEDY)) for n in (150, 9))
    while not short.tokens:
        engine.step()
    assert not long.tokens


def test_prompts_that_wait_do_not_need_room_in_the_cache(small):
    engine = default_engine(small, prefix_cache_bytes=1, num_slots=16)
    generations = send(engine, group(16, 160, 220), at_once=True)
    counts = engine.stats().prefix
    assert hits(generations, 128) == counts.hits == 15
    assert (counts.stored, counts.too_large > 0) == (0, True)


def test_forks_that_begin_alike_read_their_common_part_once(small):
    results = []
    for cache in (None, 10**7):
        engine = engine_of(small, prefix_cache_bytes=cache)
        session = engine.submit(Request(prompt(37), 4, GREEDY, keep_state=True))
        engine.run()
        forks = [engine.submit(Request(ids, 3, GREEDY), session.snapshot) for ids in group(5, 100, 130)]
        engine.run()
        results.append([facts(fork) for fork in forks])
    assert [fork.cached for fork in forks] == [0] + [96] * 4
    assert results[0] == results[1]


def test_a_snapshot_stored_in_fewer_bits_leaves_nothing_in_the_cache(small, tmp_path):
    """Nor does a fork of what continues it, unless a longer prefix in the cache replaces its state."""
    engine = engine_of(small, prefix_cache_bytes=10**7)
    session = engine.submit(Request(prompt(37), 4, GREEDY, keep_state=True))
    engine.run()
    stored = engine.stats().prefix.stored
    error = session.snapshot.save(tmp_path / "rounded", "bfloat16")
    rounded = engine.submit(Request(prompt(20), 4, GREEDY, keep_state=True), Snapshot.load(tmp_path / "rounded"))
    engine.run()
    engine.submit(Request(prompt(9), 4, GREEDY), rounded.snapshot)
    engine.run()
    assert rounded.snapshot.rounding_error == error > 0
    assert engine.stats().prefix.stored == stored
    engine.submit(Request([*prompt(37), *session.tokens, *prompt(20)], 4, GREEDY))
    engine.run()
    again = engine.submit(Request(prompt(20), 4, GREEDY, keep_state=True), Snapshot.load(tmp_path / "rounded"))
    engine.run()
    assert (again.cached, again.snapshot.rounding_error) == (20, 0)


def test_a_prompt_inside_an_earlier_one_is_told_that_no_state_is_kept_where_it_ends(small):
    engine = default_engine(small)
    send(engine, [prompt(100), prompt(60), prompt(30), prompt(100, 1)])
    assert engine.stats().prefix.misses == {
        "the cache is empty": 1,
        PARTED: 1,
        "fewer than 32 tokens in common with another prompt": 1,
        "no cached prompt begins with these tokens": 1,
    }


def test_a_change_of_the_cache_that_is_broken_off_drops_what_is_cached(small, monkeypatch):
    engine, prompts = default_engine(small), group(5, 100, 130)
    expected = [facts(g) for g in send(engine, prompts)]

    def interrupted(self, *_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(RadixTree, "insert", interrupted)
    engine.submit(Request(prompts[0], 3, GREEDY))
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    generations = send(engine, prompts)
    assert [facts(g) for g in generations] == expected
    assert [g.cached for g in generations] == [0, 0, 96, 96, 96]
    assert engine.prefixes.nbytes == len(engine.prefixes) * engine_of(small).pool.copy(0).nbytes


@pytest.mark.parametrize("length", [1, 2, 5])
def test_misses_that_share_too_little_say_so(length):
    engine = default_engine(small_model(), prefix_cache_bytes=10**7)
    send(engine, group(3, length, 40))
    assert engine.stats().prefix.misses == {
        "the cache is empty": 1,
        "fewer than 32 tokens in common with another prompt": 2,
    }


def test_the_memory_of_states_per_prompt_token_is_reported(small):
    """Two states per prompt where there is room, and one for all: the hits are the same."""
    size, tokens = engine_of(small).pool.copy(0).nbytes, 16 * 219
    for room, kept in ((10**3, 2 * 16 + 1), (2, 2)):
        engine = default_engine(small, prefix_cache_bytes=room * size)
        assert hits(send(engine, group(16, 160, 220)), 128) == 14
        counts = engine.stats().prefix
        assert (counts.states, counts.bytes_per_prompt_token) == (kept, kept * size / tokens)
    large = model_cost(preset("retnet-1.3b"), 220).state_bytes  # without its weights
    assert [round(kept * large / tokens / 1e3) for kept in (33, 2)] == [948, 57]
