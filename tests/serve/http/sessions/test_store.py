"""Sessions that are kept, opened, forked, listed and ended, in memory and in a folder."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from retnet.serve.http.sessions import store as session_store
from retnet.serve.http.sessions.store import SessionStore

from .tools import Clock, engine_of, refusal, same, snapshot_of, store_of

UNKNOWN = "sess_" + 40 * "0"


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that is a coroutine function."""

    @wraps(test)
    def run(*arguments: Any, **options: Any) -> None:
        asyncio.run(test(*arguments, **options))

    return run


@pytest.fixture(scope="module")
def engine():
    return engine_of()


@pytest.fixture(params=["memory", "folder"])
def folder(request, tmp_path):
    return None if request.param == "memory" else tmp_path


@in_a_loop
async def test_a_kept_state_is_opened_again(engine, folder):
    store = store_of(engine, folder)
    snapshot = snapshot_of(engine)
    kept = await store.keep(None, snapshot, key="a", messages=[{"role": "user", "content": "Hé"}])
    assert re.fullmatch(r"sess_[0-9a-f]{40}", kept.id)
    opened = await store.open(kept.id, "a")
    assert same(opened.snapshot, snapshot)
    assert opened.messages == [{"role": "user", "content": "Hé"}]
    assert not opened.foreign
    await store.close()


@in_a_loop
async def test_another_key_and_no_such_session_get_the_same_error(engine, folder):
    store = store_of(engine, folder)
    kept = await store.keep(None, snapshot_of(engine), key="a")
    for use in (store.open, store.look, store.fork, store.delete):
        other, missing = await refusal(use(kept.id, "b")), await refusal(use(UNKNOWN, "b"))
        assert other.status == missing.status == 404
        assert other.code == missing.code == "session_not_found"
        assert other.message.replace(kept.id, UNKNOWN) == missing.message
    assert (await store.list("b", 10)) == ([], False)
    assert (await store.open(kept.id, "a")).id == kept.id
    await store.close()


@pytest.mark.parametrize(
    "session_id", ["", "sess_", "../secret", "sess_" + 39 * "0", UNKNOWN + "\n", UNKNOWN.upper(), "sess_" + 40 * "٠"]
)
@in_a_loop
async def test_ids_of_another_form_are_not_found(engine, tmp_path, session_id):
    store = store_of(engine, tmp_path)
    assert (await refusal(store.open(session_id, "a"))).status == 404
    await store.close()


@in_a_loop
async def test_a_session_moves_on_under_the_same_id(engine, folder):
    store = store_of(engine, folder)
    first = await store.keep(None, snapshot_of(engine, 9), key="a")
    later = snapshot_of(engine, 20)
    second = await store.keep(await store.open(first.id, "a"), later, key="a")
    assert second.id == first.id
    assert same((await store.open(first.id, "a")).snapshot, later)
    assert len(first.snapshot.tokens) == 10, "the old revision is as it was"
    await store.close()


@in_a_loop
async def test_of_two_requests_on_one_session_the_later_becomes_a_session_of_its_own(engine, folder):
    store = store_of(engine, folder)
    kept = await store.keep(None, snapshot_of(engine, 9), key="a")
    one, two = await store.open(kept.id, "a"), await store.open(kept.id, "a")
    assert same(one.snapshot, two.snapshot)
    states = snapshot_of(engine, 20, seed=1), snapshot_of(engine, 21, seed=2)
    first, second = await store.keep(one, states[0], key="a"), await store.keep(two, states[1], key="a")
    assert first.id == kept.id
    assert second.id != kept.id
    assert second.record.parent == kept.id
    assert same((await store.open(first.id, "a")).snapshot, states[0])
    assert same((await store.open(second.id, "a")).snapshot, states[1])
    await store.close()


@in_a_loop
async def test_a_fork_shares_the_state_and_goes_its_own_way(engine, folder):
    store = store_of(engine, folder)
    kept = await store.keep(None, snapshot_of(engine), key="a", messages=[{"role": "user"}])
    used = store.memory_used
    fork = await store.fork(kept.id, "a")
    assert fork.snapshot is kept.snapshot
    assert store.memory_used == used
    assert (fork.record.parent, fork.messages) == (kept.id, kept.messages)
    await store.keep(fork, snapshot_of(engine, 30), key="a")
    assert same((await store.open(kept.id, "a")).snapshot, kept.snapshot)
    await store.delete(kept.id, "a")
    assert len((await store.open(fork.id, "a")).snapshot.tokens) == 31
    await store.close()


@in_a_loop
async def test_a_session_deleted_during_a_request_is_not_kept(engine, folder):
    store = store_of(engine, folder)
    kept = await store.keep(None, snapshot_of(engine), key="a")
    opened = await store.open(kept.id, "a")
    await store.delete(kept.id, "a")
    assert len(opened.snapshot.tokens) == 10, "the request goes on"
    assert (await refusal(store.keep(opened, snapshot_of(engine, 20), key="a"))).status == 404
    assert (await refusal(store.open(kept.id, "a"))).status == 404
    await store.flush()
    if folder is not None:
        assert not list(folder.glob("sess_*"))
    await store.close()


@in_a_loop
async def test_descendants_of_an_uploaded_state_are_foreign(engine, folder):
    store = store_of(engine, folder)
    uploaded = await store.keep(None, snapshot_of(engine), key="a", foreign=True)
    fork = await store.fork(uploaded.id, "a")
    later = await store.keep(await store.open(fork.id, "a"), snapshot_of(engine, 20), key="a")
    beside = await store.keep(fork, snapshot_of(engine, 20), key="a")
    assert fork.foreign
    assert later.foreign
    assert beside.foreign
    assert beside.id != fork.id
    await store.close()


@in_a_loop
async def test_sessions_are_listed_in_pages_newest_first(engine, folder):
    clock = Clock()
    store = store_of(engine, folder, clock)
    ids = []
    for i in range(5):
        clock.now += 1
        ids.append((await store.keep(None, snapshot_of(engine, 5 + i), key="a")).id)
    await store.keep(None, snapshot_of(engine), key="b")
    await store.flush()
    pages, after = [], None
    for _ in range(3):
        page, more = await store.list("a", 2, after)
        pages.append([entry.record.id for entry in page])
        after = pages[-1][-1]
    assert pages == [ids[:2:-1], ids[2:0:-1], ids[:1]]
    assert not more
    assert (await refusal(store.list("a", 2, UNKNOWN))).param == "after"
    await store.close()


@in_a_loop
async def test_unused_sessions_end_and_used_ones_stay(engine, folder):
    clock = Clock()
    store = store_of(engine, folder, clock, session_ttl=100.0)
    unused, used = [(await store.keep(None, snapshot_of(engine), key="a")).id for _ in range(2)]
    clock.now += 60
    await store.open(used, "a")
    clock.now += 60
    assert [entry.record.id for entry in (await store.list("a", 9))[0]] == [used], "before any sweep"
    await store.flush()
    await store.sweep()
    assert len(store) == 1
    assert (await refusal(store.open(unused, "a"))).status == 404
    await store.open(used, "a")
    clock.now += 101
    assert (await refusal(store.open(used, "a"))).status == 404
    if folder is not None:
        assert not list(folder.glob("sess_*"))
    await store.close()


@in_a_loop
async def test_in_memory_the_least_recently_used_sessions_end_where_the_budget_is_full(engine):
    clock, size = Clock(), snapshot_of(engine).nbytes
    store = store_of(engine, None, clock, session_memory=3 * size)
    ids = []
    for _ in range(3):
        clock.now += 1
        ids.append((await store.keep(None, snapshot_of(engine), key="a")).id)
    clock.now += 1
    await store.open(ids[0], "a")
    ids.append((await store.keep(None, snapshot_of(engine), key="a")).id)
    assert store.memory_used <= 3 * size
    assert (await refusal(store.open(ids[1], "a"))).status == 404
    for left in (ids[0], ids[2], ids[3]):
        await store.open(left, "a")


@in_a_loop
async def test_a_key_that_fills_the_budget_loses_its_own_sessions(engine):
    clock, size = Clock(), snapshot_of(engine).nbytes
    store = store_of(engine, None, clock, session_memory=4 * size)
    small = (await store.keep(None, snapshot_of(engine), key="small")).id
    for _ in range(20):
        clock.now += 1
        await store.keep(None, snapshot_of(engine), key="greedy")
    assert (await store.open(small, "small")).id == small


@in_a_loop
async def test_the_number_of_sessions_is_bounded(engine, folder, monkeypatch):
    monkeypatch.setattr(session_store, "MOST_SESSIONS", 5)
    clock = Clock()
    store = store_of(engine, folder, clock)
    first = await store.keep(None, snapshot_of(engine), key="a")
    forks = []
    for _ in range(20):
        clock.now += 1
        await store.open(first.id, "a")
        forks.append((await store.fork(first.id, "a")).id)
    await store.flush()
    assert {entry.record.id for entry in (await store.list("a", 99))[0]} == {first.id, *forks[-4:]}
    if folder is not None:
        assert len(list(folder.glob("sess_*"))) == 5
    await store.close()


@in_a_loop
async def test_ids_of_ended_sessions_are_remembered_up_to_a_bound(engine, monkeypatch):
    monkeypatch.setattr(session_store, "MOST_REMEMBERED", 3)
    store = store_of(engine)
    for _ in range(9):
        await store.delete((await store.keep(None, snapshot_of(engine), key="a")).id, "a")
    assert len(store._deleted) == 3


@in_a_loop
async def test_a_state_larger_than_the_memory_of_sessions_is_refused(engine):
    store = store_of(engine, None, session_memory=100)
    error = await refusal(store.keep(None, snapshot_of(engine), key="a"))
    assert (error.status, error.code) == (507, "session_too_large")
    assert len(store) == 0


def test_a_store_needs_no_event_loop_to_be_made(engine, tmp_path):
    assert isinstance(store_of(engine, tmp_path), SessionStore)
