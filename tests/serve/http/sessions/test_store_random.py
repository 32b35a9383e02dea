"""Random operations on stores of sessions at the same time: no wrong state or key, no hang, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from retnet.serve.http.errors import ApiError
from retnet.serve.http.sessions.store import SessionStore

from .tools import Clock, engine_of, same, snapshot_of, store_of

ENDED = {404, 507}  # deleted, expired, pushed out; no room


class Users:
    """Callers of stores that share a folder, or of one in memory. They know which states each session may have."""

    def __init__(self, seed: int, folder: Path | None):
        self.rng, self.clock, self.folder = random.Random(seed), Clock(), folder
        engine = engine_of()
        self.states = {5 + i: snapshot_of(engine, 4 + i, i) for i in range(12)}
        self.size = max(state.nbytes for state in self.states.values())
        options = {
            "session_memory": int(self.size * (self.rng.choice([0.5, 2.5, 6.5]) if folder else 9.5)),
            "session_disk": int(self.size * 9.5),
            "session_ttl": 300.0,
        }
        count = 1 if folder is None else self.rng.choice([1, 2])
        self.stores = [store_of(engine, folder, self.clock, **options) for _ in range(count)]
        self.kept: dict[str, tuple[str, set[int]]] = {}  # by id: the key, and the lengths that its state may have
        self.counts: Counter[str] = Counter()

    async def act(self) -> None:
        """One random operation."""
        name = self.rng.choice(["keep_new", "go_on", "go_on", "go_on", "fork", "delete", "list", "sweep", "break_off"])
        operation: Callable[[SessionStore], Awaitable[None]] = getattr(self, f"_{name}")
        try:
            await operation(self.rng.choice(self.stores))
            self.counts[name] += 1
        except ApiError as error:
            if error.status not in ENDED:
                raise
            self.counts[str(error.status)] += 1
        self.clock.now += self.rng.random()

    async def _keep_new(self, store: SessionStore) -> None:
        key, length = self.rng.choice("ab"), self.rng.choice(list(self.states))
        session = await store.keep(None, self.states[length], key=key)
        self.kept[session.id] = key, {length}

    async def _opened(self, store: SessionStore):
        session_id = self.rng.choice(list(self.kept)[-12:] or ["sess_" + 40 * "0"])
        key, lengths = self.kept.get(session_id, ("a", set()))
        if self.rng.random() < 0.1:
            with pytest.raises(ApiError):
                await store.open(session_id, "another key")
        session = await store.open(session_id, key)
        length = len(session.snapshot.tokens)
        assert length in lengths
        assert same(session.snapshot, self.states[length])
        return session, key

    async def _go_on(self, store: SessionStore) -> None:
        session, key = await self._opened(store)
        await asyncio.sleep(self.rng.random() * 0.005)
        length = self.rng.choice(list(self.states))
        self.kept[session.id][1].add(length)
        later = await store.keep(session, self.states[length], key=key)
        if later.id != session.id:
            assert later.record.parent == session.id
            self.kept[later.id] = key, {length}

    async def _fork(self, store: SessionStore) -> None:
        session, key = await self._opened(store)
        fork = await store.fork(session.id, key)
        self.kept[fork.id] = key, set(self.kept[session.id][1])

    async def _delete(self, store: SessionStore) -> None:
        if self.kept and self.rng.random() < 0.5:
            session_id = self.rng.choice(list(self.kept)[-12:])
            await store.delete(session_id, self.kept[session_id][0])

    async def _list(self, store: SessionStore) -> None:
        key = self.rng.choice("ab")
        for entry in (await store.list(key, 100))[0]:
            assert self.kept.get(entry.record.id, (key, None))[0] == key

    async def _sweep(self, store: SessionStore) -> None:
        await store.sweep()

    async def _break_off(self, store: SessionStore) -> None:
        session, key = await self._opened(store)
        self.kept[session.id][1].add(5)
        task = asyncio.create_task(store.keep(session, self.states[5], key=key))
        await asyncio.sleep(0)
        task.cancel()
        try:
            later = await task
        except asyncio.CancelledError:
            return
        self.kept.setdefault(later.id, (key, {5}))

    async def end(self) -> None:
        """All stores agree on every session, and nothing is left behind."""
        for store in self.stores:
            await store.flush()
            assert not store._tasks
        for session_id, (key, _) in self.kept.items():
            found = set()
            for store in self.stores:
                try:
                    found.add((await store.open(session_id, key)).record)
                except ApiError as error:
                    if error.status not in ENDED:
                        raise
                    found.add(None)
            assert len(found) == 1
        for store in self.stores:
            await store.close()
            assert store.memory_used <= store.memory
        if self.folder is not None:
            assert not (self.folder / "damaged").exists()
            assert not list(self.folder.glob(".*.part"))
            assert sum(path.stat().st_size for path in self.folder.glob("sess_*")) < 20 * self.size


async def used_at_random(seed: int, folder: Path | None, rounds: int) -> Counter[str]:
    users = Users(seed, folder)
    async with asyncio.timeout(300):
        for _ in range(rounds):
            await asyncio.gather(*(users.act() for _ in range(users.rng.randint(1, 12))))
        await users.end()
    return users.counts


@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("seed", [0, 1])
def test_stores_keep_their_promises_under_random_use(tmp_path, seed, place):
    counts = asyncio.run(used_at_random(seed, tmp_path if place == "folder" else None, 40))
    assert counts["go_on"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_stores_keep_their_promises_under_long_random_use(tmp_path, seed):
    counts = asyncio.run(used_at_random(seed, tmp_path, 600))
    assert counts["go_on"] > 200
