"""Sessions in a folder: restarts, damaged files, permissions, several servers, and writers that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retnet.models.decode.sampling import Sampling
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.http.sessions import files as session_files
from retnet.serve.http.sessions.files import SessionFiles
from retnet.serve.http.sessions.record import Record
from retnet.serve.request import Request

from .tools import GREEDY, Clock, engine_of, refusal, same, snapshot_of, store_of


@pytest.fixture(scope="module")
def engine():
    return engine_of()


def run(work: Any) -> Any:
    return asyncio.run(work)


async def kept_and_closed(engine: Engine, folder: Path, *snapshots: Snapshot, **options: Any) -> list[str]:
    """The ids of sessions with these states, in the folder of a store that is closed."""
    store = store_of(engine, folder)
    ids = [(await store.keep(None, snapshot, key="a", **options)).id for snapshot in snapshots]
    await store.close()
    return ids


def continued(engine: Engine, snapshot: Snapshot, count: int, sampling: Sampling = GREEDY) -> list[int]:
    generation = engine.submit(Request([], count, sampling), snapshot)
    engine.run()
    return generation.tokens


SAMPLED = Sampling(temperature=0.9, seed=3, repetition_penalty=1.3)


@pytest.mark.parametrize(
    ("stack", "sampling"),
    [
        ("retention", GREEDY),
        ("hybrid", SAMPLED),
        pytest.param("retention", SAMPLED, marks=pytest.mark.slow),
        pytest.param("hybrid", GREEDY, marks=pytest.mark.slow),
    ],
)
def test_after_a_restart_a_session_goes_on_as_one_uninterrupted_generation(tmp_path, stack, sampling):
    engine = engine_of(stack)
    whole = engine.submit(Request([5, 6, 7] * 9, 40, replace(sampling, logprobs=2)))
    first = engine.submit(Request([5, 6, 7] * 9, 15, sampling, keep_state=True))
    engine.run()
    [session_id] = run(kept_and_closed(engine, tmp_path, first.snapshot, messages=[{"role": "user"}]))

    async def reopened(other: Engine):
        store = store_of(other, tmp_path)
        session = await store.open(session_id, "a")
        assert session.messages == [{"role": "user"}]
        assert (await refusal(store.open(session_id, "b"))).status == 404, "the binding to the key is kept"
        await store.close()
        return session.snapshot

    for slots in (4, 8):  # 4: bit-identical
        other = engine_of(stack, num_slots=slots)
        generation = other.submit(Request([], 25, replace(sampling, logprobs=2)), run(reopened(other)))
        other.run()
        assert generation.tokens == whole.tokens[15:]
        assert slots != 4 or generation.logprobs == whole.logprobs[15:]
    assert other.stats().prompt_tokens == 0


def test_a_restart_keeps_the_taint_of_uploads_and_the_parent_of_forks(engine, tmp_path):
    async def before():
        store = store_of(engine, tmp_path)
        uploaded = await store.keep(None, snapshot_of(engine), key="a", foreign=True)
        fork = await store.fork(uploaded.id, "a")
        await store.close()
        return uploaded.id, fork.id

    uploaded, fork = run(before())

    async def after():
        store = store_of(engine, tmp_path)
        found = {e.record.id: e.record for e in (await store.list("a", 9))[0]}
        later = await store.keep(await store.open(fork, "a"), snapshot_of(engine, 20), key="a")
        await store.close()
        return found, later

    found, later = run(after())
    assert found[uploaded].foreign
    assert found[fork].foreign
    assert later.foreign
    assert found[fork].parent == uploaded
    assert found[fork].created == found[uploaded].created


def test_times_of_use_are_kept_by_a_restart(engine, tmp_path):
    clock = Clock()

    async def before():
        store = store_of(engine, tmp_path, clock)
        kept = await store.keep(None, snapshot_of(engine), key="a")
        await store.flush()
        clock.now += 50
        await store.open(kept.id, "a")
        await store.close()
        return kept.id

    session_id = run(before())
    clock.now += 80

    async def after():
        store = store_of(engine, tmp_path, clock, session_ttl=100)
        entry = await store.look(session_id, "a")
        assert clock.now - entry.used == pytest.approx(80, abs=0.01)
        clock.now += 21
        assert (await refusal(store.open(session_id, "a"))).status == 404
        await store.close()

    run(after())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data.replace(b'"extra.session"', b'"extra.sessiom"'),
        lambda data: data.replace(b'\\"revision\\": 1', b'\\"revision\\": x'),
        lambda data: data.replace(b"retnet-snapshot", b"retnet-snapshut"),
        lambda data: os.urandom(len(data)),
    ],
)
def test_a_damaged_file_is_set_aside_and_the_others_are_there(engine, tmp_path, damage, caplog):
    ids = run(kept_and_closed(engine, tmp_path, snapshot_of(engine), snapshot_of(engine, 12)))
    path = tmp_path / f"{ids[0]}.safetensors"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    store = store_of(engine, tmp_path)
    assert len(store) == 1
    assert (tmp_path / "damaged" / path.name).exists()
    assert "is damaged and is set aside" in caplog.text
    run(_opens(store, ids[1]))


async def _opens(store, session_id: str) -> None:
    assert (await store.open(session_id, "a")).id == session_id
    await store.close()


def test_a_file_whose_values_were_changed_is_set_aside_when_it_is_opened(engine, tmp_path, caplog):
    [session_id] = run(kept_and_closed(engine, tmp_path, snapshot_of(engine)))
    path = tmp_path / f"{session_id}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    async def opened():
        store = store_of(engine, tmp_path)
        assert len(store) == 1
        error = await refusal(store.open(session_id, "a"))
        assert (error.status, error.code) == (410, "session_damaged")
        assert (await refusal(store.open(session_id, "a"))).status == 404
        await store.close()

    run(opened())
    assert not path.exists()
    assert (tmp_path / "damaged" / path.name).read_bytes() == data


def test_a_newer_revision_in_memory_replaces_a_damaged_file(engine, tmp_path):
    async def used():
        store = store_of(engine, tmp_path)
        kept = await store.keep(None, snapshot_of(engine), key="a")
        await store.flush()
        opened = await store.open(kept.id, "a")
        path = tmp_path / f"{kept.id}.safetensors"
        path.write_bytes(b"damaged")
        later = await store.keep(opened, snapshot_of(engine, 20), key="a")
        await store.flush()
        assert (await store.open(kept.id, "a")).record == later.record
        assert Snapshot.load(path).tokens == later.snapshot.tokens
        await store.close()

    run(used())
    assert (tmp_path / "damaged").exists()


def test_a_deletion_that_is_cancelled_is_still_done(engine, tmp_path):
    async def used():
        store = store_of(engine, tmp_path)
        kept = await store.keep(None, snapshot_of(engine), key="a")
        await store.flush()
        deletion = asyncio.create_task(store._end(store._entries[kept.id]))
        await asyncio.sleep(0)
        deletion.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deletion
        await store.close()

    run(used())
    assert not list(tmp_path.glob("sess_*"))


def test_a_file_under_the_name_of_another_session_is_set_aside(engine, tmp_path):
    ids = run(kept_and_closed(engine, tmp_path, snapshot_of(engine), snapshot_of(engine, 12)))
    os.replace(tmp_path / f"{ids[0]}.safetensors", tmp_path / f"{ids[1]}.safetensors")
    assert len(store_of(engine, tmp_path)) == 0


@pytest.mark.parametrize("reader", [SessionFiles.look, SessionFiles.read])
def test_a_file_that_another_server_deletes_while_it_is_opened_is_not_there(engine, tmp_path, monkeypatch, reader):
    [session_id] = run(kept_and_closed(engine, tmp_path, snapshot_of(engine)))

    def open_late(path: Path, framework: str) -> None:
        path.unlink()
        torch.UntypedStorage.from_file(str(path), False, 100)  # as safetensors does after it has checked the head

    monkeypatch.setattr("retnet.models.snapshot_file.safe_open", open_late)
    assert reader(SessionFiles(tmp_path), session_id) is None


def test_a_session_of_another_model_is_named_and_not_continued(engine, tmp_path):
    [session_id] = run(kept_and_closed(engine, tmp_path, snapshot_of(engine)))

    async def opened():
        store = store_of(engine_of("gated"), tmp_path)
        assert [entry.record.id for entry in (await store.list("a", 9))[0]] == [session_id]
        error = await refusal(store.open(session_id, "a"))
        assert (error.status, error.code) == (409, "session_of_another_model")
        await store.delete(session_id, "a")
        await store.close()

    run(opened())
    assert not list(tmp_path.glob("sess_*"))


def test_only_the_owner_of_the_folder_may_read_it(engine, tmp_path):
    folder = tmp_path / "state"
    old = os.umask(0)
    try:
        run(kept_and_closed(engine, folder, snapshot_of(engine)))
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path.name


def test_the_files_do_not_hold_the_key(engine, tmp_path):
    async def kept():
        store = store_of(engine, tmp_path)
        await store.keep(None, snapshot_of(engine), key="key-of-zoe")
        await store.close()

    run(kept())
    assert all(b"key-of-zoe" not in path.read_bytes() for path in tmp_path.iterdir())
    assert len((tmp_path / "secret").read_bytes()) == 32


def test_without_its_secret_a_folder_is_refused(tmp_path):
    SessionFiles(tmp_path).secret()
    (tmp_path / "secret").write_bytes(b"")
    with pytest.raises(OSError, match="has 0 bytes; accepted: 32"):
        SessionFiles(tmp_path).secret()


def test_two_servers_on_one_folder_see_each_other_s_sessions(engine, tmp_path):
    async def both():
        clock = Clock()
        one, two = store_of(engine, tmp_path, clock), store_of(engine, tmp_path, clock)
        kept = await one.keep(None, snapshot_of(engine), key="a")
        await one.flush()
        seen = await two.open(kept.id, "a")
        assert same(seen.snapshot, kept.snapshot)
        later = snapshot_of(engine, 20)
        await two.keep(seen, later, key="a")
        await two.flush()
        assert same((await one.open(kept.id, "a")).snapshot, later), "the newer revision, not the one in memory"
        await one.delete(kept.id, "a")
        assert (await refusal(two.open(kept.id, "a"))).status == 404
        assert (await two.list("a", 9))[0] == []
        await one.close()
        await two.close()

    run(both())


def test_with_session_sync_a_kept_session_is_on_disk_at_once(engine, tmp_path, monkeypatch):
    async def both():
        clock = Clock()
        one, two = (store_of(engine, tmp_path, clock, session_sync=True) for _ in range(2))
        kept = await one.keep(None, snapshot_of(engine), key="a")
        for turn in range(6):  # in turns, without waiting for anything but the answer
            store = (one, two)[turn % 2]
            opened = await store.open(kept.id, "a")
            assert opened.record.revision == turn + 1
            kept = await store.keep(opened, snapshot_of(engine, 12 + turn), key="a")
            assert kept.id == opened.id

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(session_files, "flush", full)
        opened = await one.open(kept.id, "a")
        for session in (None, opened):
            error = await refusal(one.keep(session, snapshot_of(engine, 40), key="a"))
            assert (error.status, error.code) == (507, "session_not_written")
        assert len(one) == 1
        assert same((await one.open(kept.id, "a")).snapshot, opened.snapshot)
        monkeypatch.undo()
        await one.close()
        await two.close()

    run(both())


def test_of_two_servers_the_higher_revision_wins_and_deletion_wins_over_both(engine, tmp_path):
    async def both():
        one, two = store_of(engine, tmp_path), store_of(engine, tmp_path)
        kept = await one.keep(None, snapshot_of(engine), key="a")
        await one.flush()
        stale = await two.open(kept.id, "a")
        for length in (20, 30):
            await one.keep(await one.open(kept.id, "a"), snapshot_of(engine, length), key="a")
        await one.flush()
        await two.keep(stale, snapshot_of(engine, 25), key="a")
        await two.flush()
        for store in (one, two):
            assert len((await store.open(kept.id, "a")).snapshot.tokens) == 31
        newest = await two.open(kept.id, "a")
        await one.delete(kept.id, "a")
        await two.keep(newest, snapshot_of(engine, 40), key="a")
        await two.flush()
        assert (await refusal(two.open(kept.id, "a"))).status == 404
        assert not list(tmp_path.glob("sess_*"))
        await one.close()
        await two.close()

    run(both())


def test_of_two_servers_that_write_the_same_revision_the_last_wins_in_both(engine, tmp_path):
    async def both():
        one, two = store_of(engine, tmp_path), store_of(engine, tmp_path)
        kept = await one.keep(None, snapshot_of(engine), key="a")
        await one.flush()
        opened = [(store, await store.open(kept.id, "a")) for store in (one, two)]
        for length, (store, session) in zip((20, 25), opened, strict=True):
            await store.keep(session, snapshot_of(engine, length), key="a")
            await store.flush()
        for store in (one, two):
            assert len((await store.open(kept.id, "a")).snapshot.tokens) == 26
        await one.close()
        await two.close()

    run(both())


def test_a_session_that_another_server_uses_does_not_expire(engine, tmp_path):
    async def both():
        clock = Clock()
        one, two = (store_of(engine, tmp_path, clock, session_ttl=100.0) for _ in range(2))
        kept = await one.keep(None, snapshot_of(engine), key="a")
        await one.flush()
        clock.now += 60
        await two.open(kept.id, "a")
        await two.flush()
        clock.now += 60
        await one.sweep()
        assert len(one) == 1
        await one.open(kept.id, "a")
        await one.close()
        await two.close()

    run(both())


def test_states_leave_a_small_memory_for_the_disk_and_come_back(engine, tmp_path):
    async def used():
        snapshots = [snapshot_of(engine, 9 + i) for i in range(6)]
        clock = Clock()
        store = store_of(engine, tmp_path, clock, session_memory=2 * snapshots[-1].nbytes)
        ids = []
        for snapshot in snapshots:
            clock.now += 1
            ids.append((await store.keep(None, snapshot, key="a")).id)
            assert store.memory_used <= store.memory
        for session_id, snapshot in zip(ids, snapshots):
            clock.now += 1
            assert same((await store.open(session_id, "a")).snapshot, snapshot)
            assert store.memory_used <= store.memory
        one = store_of(engine, tmp_path, session_memory=10)  # less than one state
        assert same((await one.open(ids[0], "a")).snapshot, snapshots[0])
        kept = await one.keep(None, snapshots[1], key="a")
        assert one.memory_used == 0
        assert same((await one.open(kept.id, "a")).snapshot, snapshots[1])
        await store.close()
        await one.close()

    run(used())


def test_a_full_disk_budget_ends_the_least_recently_used_sessions(engine, tmp_path):
    async def used():
        clock, size = Clock(), snapshot_of(engine).nbytes
        store = store_of(engine, tmp_path, clock, session_disk=3 * size)
        ids = []
        for _ in range(5):
            clock.now += 1
            ids.append((await store.keep(None, snapshot_of(engine), key="a")).id)
            await store.flush()
        assert {path.stem for path in tmp_path.glob("sess_*")} == set(ids[2:])
        assert (await refusal(store.open(ids[0], "a"))).status == 404
        await store.close()

    run(used())


def test_a_session_that_cannot_be_written_stays_in_memory_and_is_tried_again(engine, tmp_path, monkeypatch, caplog):
    async def used():
        store = store_of(engine, tmp_path)

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(session_files, "flush", full)
            kept = await store.keep(None, snapshot_of(engine), key="a")
            await store.flush()
        assert "No space left" in caplog.text
        assert not list(tmp_path.glob("*sess_*")), "nothing half written"
        assert (await store.open(kept.id, "a")).id == kept.id
        await store.sweep()
        await store.flush()
        assert list(tmp_path.glob("sess_*"))
        await store.close()

    run(used())


def test_a_session_that_fits_neither_memory_nor_disk_is_refused(engine, tmp_path):
    async def used():
        store = store_of(engine, tmp_path, session_memory=10, session_disk=10)
        error = await refusal(store.keep(None, snapshot_of(engine), key="a"))
        assert error.status == 507
        assert len(store) == 0
        await store.close()

    run(used())


def test_files_that_killed_writers_left_are_removed_after_a_while(engine, tmp_path):
    left, *others = (tmp_path / name for name in (f".sess_{'0' * 40}.aabbccdd.part", "notes.txt", "film.mkv.part"))
    for path in (left, *others):
        path.write_bytes(b"x")
    files = SessionFiles(tmp_path)
    files.scan()
    assert left.exists(), "its writer may be at work"
    files.now = lambda: time.time() + session_files.ABANDONED_SECONDS + 1
    files.scan()
    assert not left.exists()
    assert all(other.exists() for other in others), "they are not the server's"


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../secret"},
        {"parent": "x"},
        {"revision": "1"},
        {"revision": True},
        {"tokens": -1},
        {"foreign": 0},
        {"owner": None},
        {"created": float("nan")},
        {"more": 1},
    ],
)
def test_a_record_of_another_form_is_refused(change):
    record = Record("sess_" + 40 * "0", "o", "m", 1, 1.0, False, None, 3, 4)
    assert Record.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="record"):
        Record.from_json(json.dumps(json.loads(record.to_json()) | change))
    for text in ("[" * 100_000, "[]", "{}", "x"):
        with pytest.raises(ValueError, match=r"record|Expecting"):
            Record.from_json(text)


def _forked(work: Callable[[], None]) -> int:
    """The id of a child process that runs `work`."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    return child


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_writes_leaves_every_session_old_or_new_and_whole(tmp_path):
    """Each revision of a session is a later state of one greedy generation, so its tokens and next tokens are known."""
    engine, rng = engine_of("hybrid"), random.Random(0)
    chains: list[list[Snapshot]] = []
    for seed in range(4):
        chain = [snapshot_of(engine, 9 + seed, seed)]
        for _ in range(11):
            generation = engine.submit(Request([], 3, GREEDY, keep_state=True), chain[-1])
            engine.run()
            chain.append(generation.snapshot)
        chains.append(chain)
    log = tmp_path / "log"
    folder = tmp_path / "state"
    ids = run(kept_and_closed(engine, folder, *[chain[0] for chain in chains]))
    moved, torn, revisions = 0, 0, [1] * len(ids)

    def write() -> None:
        async def loop() -> None:
            store = store_of(engine, folder)
            note = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            at = list(revisions)
            while True:
                i = rng.randrange(len(ids))
                session = await store.open(ids[i], "a")
                at[i] += 1
                os.write(note, f"begun {i} {at[i]}\n".encode())
                await store.keep(session, chains[i][(at[i] - 1) % 12], key="a")
                if rng.random() < 0.7:
                    await store.flush()
                    os.write(note, f"done {i} {at[i]}\n".encode())

        asyncio.run(loop())

    for trial in range(60):
        rng.seed(trial)
        child = _forked(write)
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for unfinished in folder.glob(".sess_*.part"):
            unfinished.unlink()
            torn += 1
        begun, done = list(revisions), list(revisions)
        for line in log.read_text().splitlines():
            word, i, revision = line.split()
            (begun if word == "begun" else done)[int(i)] = int(revision)
        log.unlink()

        async def check(begun: list[int], done: list[int]) -> None:
            store = store_of(engine, folder)
            assert len(store) == len(ids)
            for i, session_id in enumerate(ids):
                session = await store.open(session_id, "a")
                revision = session.record.revision
                assert done[i] <= revision <= begun[i]
                expected = chains[i][(revision - 1) % 12]
                assert same(session.snapshot, expected)
                assert continued(engine, session.snapshot, 4) == continued(engine, expected, 4)
                revisions[i] = revision
            await store.close()

        before = list(revisions)
        run(check(begun, done))
        moved += sum(a != b for a, b in zip(before, revisions))
    assert not (folder / "damaged").exists()
    assert moved > 60, "the writers were killed before they wrote"
    assert torn > 5, "no writer was killed in the middle of a file"
