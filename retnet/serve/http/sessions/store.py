"""Sessions: states of conversations that outlive their requests, each bound to the API key that made it.

A session is a series of revisions. A revision never changes, so a fork shares it, and a request that continues it is
not disturbed by others. Revisions live in memory and, with a folder, in one file per session (`session_files`). A kept
revision is written in the background at once. Memory is then a cache: the least recently used leave it and are read
again on demand. Without a folder they end. Sessions also end when they are deleted, when nothing used them for
`session_ttl`, and when the folder is over its budget.

All methods run in one event loop. Files are read and written by worker threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from retnet.models.snapshot import Snapshot
from retnet.serve.http.errors import ApiError
from retnet.serve.http.sessions.entry import Entry, least_used
from retnet.serve.http.sessions.files import Damaged, Deleted, Replaced, SessionFiles
from retnet.serve.http.sessions.record import ID_PATTERN, Record, Session, new_id
from retnet.serve.http.settings import Settings
from retnet.system.checks import quoted
from retnet.system.sizes import format_bytes

R = TypeVar("R")
WORKERS = 4  # threads that read and write files
MOST_SESSIONS = 10_000  # beyond which the least recently used end, however small they are
MOST_REMEMBERED = 100_000  # ids of sessions that ended
log = logging.getLogger("retnet.serve")


class SessionStore:
    """The sessions of one model.

    model: its fingerprint. clock: seconds since the epoch. Raises OSError if the folder cannot be used.
    """

    def __init__(self, settings: Settings, model: str, *, clock: Callable[[], float] = time.time):
        self.memory, self.disk, self.ttl = settings.session_memory, settings.session_disk, settings.session_ttl
        self.sync, self.model, self.clock = settings.session_sync, model, clock
        self.files = None if settings.state_dir is None else SessionFiles(settings.state_dir)
        self._secret = secrets.token_bytes(32) if self.files is None else self.files.secret()
        self._entries: dict[str, Entry] = {}
        self._deleted: dict[str, None] = {}  # ids, the oldest first
        self._workers = ThreadPoolExecutor(WORKERS, "retnet sessions")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sweeping: asyncio.Task[None] | None = None
        if self.files is not None:
            self._update(self.files.scan())

    async def start(self) -> None:
        """Begin to end expired sessions by themselves."""
        self._sweeping = asyncio.create_task(self._sweep_regularly())

    async def close(self) -> None:
        """Write what is not on disk, and stop. Nothing may be kept afterwards."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeping
            self._sweeping = None
        await self.flush()
        self._workers.shutdown()

    async def flush(self) -> None:
        """Wait until every session is on disk, if there is a folder, and its use is noted there."""
        for entry in list(self._entries.values()):
            self._write_soon(entry)
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def open(self, session_id: str, key: str) -> Session:
        """The newest revision of a session, to continue it. Raises ApiError 404 if the key has no such session."""
        entry = await self._find(session_id, key)
        if entry.record.model != self.model:
            raise ApiError(
                409,
                f"session {session_id} is of another model ({entry.record.model[:12]}) than this server's "
                f"({self.model[:12]}); accepted: a session of the same weights, dtype and configuration",
                code="session_of_another_model",
                param="session_id",
            )
        session = entry.session or await self._load(entry)
        self._touch(entry)
        return session

    async def keep(
        self,
        session: Session | None,
        snapshot: Snapshot,
        *,
        key: str,
        messages: list[dict[str, Any]] | None = None,
        foreign: bool = False,
        ended: bool = False,
    ) -> Session:
        """Keep a state: the next revision of `session`, or a new session if it is None. ended: see Record.

        If the session got another revision since it was opened, both are kept: this one becomes a session of its own,
        whose `parent` is the id of the other. Raises ApiError 404 if it was deleted meanwhile, and 507 if the state is
        larger than the memory that sessions may take.
        """
        parent, session_id, revision = None, new_id(), 1
        if session is not None:
            if session.id in self._deleted:
                raise not_found(session.id)
            foreign = foreign or session.record.foreign
            current = self._entries.get(session.id)
            if current is None or current.record.revision == session.record.revision:
                session_id, revision, parent = session.id, session.record.revision + 1, session.record.parent
            else:
                parent = session.id
        now = self.clock()
        record = Record(
            id=session_id,
            owner=self._owner(key),
            model=snapshot.model,
            revision=revision,
            created=session.record.created if session is not None and session.id == session_id else now,
            foreign=foreign,
            parent=parent,
            tokens=len(snapshot.tokens),
            bytes=snapshot.nbytes + (0 if messages is None else len(json.dumps(messages))),
            ended=ended,
        )
        return await self._add(Session(record, snapshot, messages), now)

    async def fork(self, session_id: str, key: str) -> Session:
        """A second session that begins as this one is. Nothing is copied."""
        session = await self.open(session_id, key)
        now = self.clock()
        record = replace(session.record, id=new_id(), revision=1, created=now, parent=session_id)
        return await self._add(replace(session, record=record), now)

    async def delete(self, session_id: str, key: str) -> None:
        """End a session. Requests that run on go on from their revision, and cannot keep another."""
        entry = await self._find(session_id, key)
        await self._end(entry)

    async def look(self, session_id: str, key: str) -> Entry:
        """What is known of a session, without reading its state or counting as a use."""
        return await self._find(session_id, key)

    async def list(self, key: str, limit: int, after: str | None = None) -> tuple[list[Entry], bool]:
        """The key's sessions, newest first, those after session `after`; and whether there are more than `limit`."""
        await self._scan()
        owner, now = self._owner(key), self.clock()
        mine = [e for e in self._entries.values() if e.record.owner == owner and not self._expired(e, now)]
        mine.sort(key=lambda entry: (-entry.record.created, entry.record.id))
        if after is not None:
            found = [i for i, entry in enumerate(mine) if entry.record.id == after]
            if not found:
                raise not_found(after, param="after")
            mine = mine[found[0] + 1 :]
        return mine[:limit], len(mine) > limit

    async def sweep(self) -> None:
        """End the sessions that nothing has used for `ttl`, and write those whose last attempt failed."""
        await self._scan()
        now = self.clock()
        for entry in list(self._entries.values()):
            if self._expired(entry, now):
                await self._expire(entry, now)
            else:
                self._write_soon(entry)

    @property
    def memory_used(self) -> int:
        """Bytes of all states in memory; states that several sessions share count once."""
        held = {id(e.session.snapshot): e.record.bytes for e in self._entries.values() if e.session is not None}
        return sum(held.values())

    @property
    def disk_used(self) -> int:
        return sum(entry.record.bytes for entry in self._entries.values() if entry.stored is not None)

    def __len__(self) -> int:
        return len(self._entries)

    def _owner(self, key: str) -> str:
        """A keyed hash: it binds a session to the key without telling the key."""
        return hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()

    async def _find(self, session_id: str, key: str) -> Entry:
        if not isinstance(session_id, str) or not ID_PATTERN.fullmatch(session_id) or session_id in self._deleted:
            raise not_found(session_id)
        entry = self._entries.get(session_id)
        if self.files is not None and (entry is None or (entry.stored is not None and entry.writing is None)):
            entry = await self._compare_with_file(session_id)
        if entry is None or not hmac.compare_digest(entry.record.owner, self._owner(key)):
            raise not_found(session_id)
        now = self.clock()
        if self._expired(entry, now):
            await self._expire(entry, now)
            raise not_found(session_id)
        return entry

    async def _compare_with_file(self, session_id: str) -> Entry | None:
        """The entry as another process that shares the folder may have left it: moved on, or deleted."""
        assert self.files is not None
        found = await self._in_worker(self.files.look, session_id)
        entry = self._entries.get(session_id)
        if found is not None:
            self._update([found])
        elif entry is not None and entry.stored is not None and entry.writing is None:
            self._forget(entry, for_good=True)
        return None if session_id in self._deleted else self._entries.get(session_id)

    async def _scan(self) -> None:
        """Take over what other processes that share the folder wrote and deleted."""
        if self.files is None:
            return
        on_disk = [entry for entry in self._entries.values() if entry.stored is not None and entry.writing is None]
        found = await self._in_worker(self.files.scan)
        names = {record.id for record, _ in found}
        self._update(found)
        for entry in on_disk:
            if entry.record.id not in names:
                await self._compare_with_file(entry.record.id)

    def _update(self, found: Iterable[tuple[Record, float]]) -> None:
        """Take over what the folder holds: times of last use, and records that are newer, or of the same revision from
        another server. A session that is being written compares itself with its file."""
        for record, used in found:
            if record.id in self._deleted:
                continue
            entry = self._entries.setdefault(record.id, Entry(record, used))
            entry.used = max(entry.used, used)
            if entry.writing is not None:
                continue
            if entry.stored is None or record.revision >= entry.stored:
                entry.stored = record.revision
            if record.revision >= entry.record.revision and record != entry.record:
                entry.record, entry.session = record, None

    async def _load(self, entry: Entry) -> Session:
        """The revision on disk, read once for all who wait for it."""
        if entry.loading is None:
            entry.loading = self._task(self._read(entry))
        return await asyncio.shield(entry.loading)

    async def _read(self, entry: Entry) -> Session:
        assert self.files is not None
        try:
            try:
                session = await self._in_worker(self.files.read, entry.record.id)
            except Damaged as error:
                self._forget(entry)
                raise ApiError(410, f"{error}; it was set aside", code="session_damaged") from error
            if session is None:
                self._forget(entry)
                raise not_found(entry.record.id)
            if session.record.revision >= entry.record.revision:
                entry.record, entry.session, entry.stored = session.record, session, session.record.revision
            await self._make_room(entry)
            return session
        finally:
            entry.loading = None

    async def _add(self, session: Session, now: float) -> Session:
        record = session.record
        if self.files is None and record.bytes > self.memory:
            raise ApiError(
                507,
                f"the state takes {format_bytes(record.bytes)} and sessions may take {format_bytes(self.memory)} of "
                "memory; accepted: a server with a larger budget, or with a folder for sessions",
                code="session_too_large",
            )
        entry = self._entries.get(record.id)
        before = None if entry is None else (entry.record, entry.session)
        if entry is None:
            entry = self._entries[record.id] = Entry(record, now)
        entry.record, entry.session, entry.used = record, session, now
        while len(self._entries) > MOST_SESSIONS:
            least = least_used([other for other in self._entries.values() if other is not entry])
            assert least is not None
            await self._end(least)
        self._write_soon(entry)
        if self.sync and entry.writing is not None:
            await asyncio.wait([entry.writing])
        lost = self.sync and entry.error is not None and entry.record is record
        if lost:
            self._take_back(entry, before)
        await self._make_room(entry)
        if lost or (entry.error is not None and not self._is_here(entry)):
            raise ApiError(507, f"the session could not be written: {entry.error}", code="session_not_written")
        return session

    def _take_back(self, entry: Entry, before: tuple[Record, Session | None] | None) -> None:
        """Undo a revision that could not be written."""
        if before is None:
            self._forget(entry)
            entry.session = None
        else:
            entry.record, entry.session = before

    async def _make_room(self, newest: Entry) -> None:
        """Take the least recently used states out of memory until the others fit."""
        while self.memory_used > self.memory:
            held = [entry for entry in self._entries.values() if entry.session is not None]
            others = [entry for entry in held if entry is not newest]
            entry = least_used(others or (held if self.files is not None else []))
            if entry is None:
                return
            if entry.writing is not None:
                await asyncio.wait([entry.writing])
            elif entry.is_stored:
                entry.session = None
            else:
                if entry.error is not None:
                    log.warning("a session ends: there is no room in memory, and writing it failed: %s", entry.error)
                self._forget(entry)

    def _write_soon(self, entry: Entry) -> None:
        if self.files is not None and entry.session is not None and not entry.is_stored and entry.writing is None:
            entry.writing = self._task(self._write(entry))

    async def _write(self, entry: Entry) -> None:
        """Write revisions of a session until the newest is on disk; those that came meanwhile are skipped."""
        assert self.files is not None
        try:
            while entry.session is not None and not entry.is_stored and self._is_here(entry):
                session = entry.session
                await self._make_room_on_disk(entry)
                if not self._is_here(entry):
                    break
                await self._in_worker(self.files.write, session, entry.used, entry.stored is not None)
                entry.stored, entry.error = session.record.revision, None
        except Deleted:
            self._forget(entry, for_good=True)
        except Replaced as newer:
            entry.stored = newer.record.revision
            entry.record, entry.session = newer.record, None
        except Exception as error:
            entry.error = str(error)
            log.exception("a session could not be written; it stays in memory")
        finally:
            entry.writing = None
            if not self._is_here(entry):  # deleted while it was written
                await self._in_worker(self.files.delete, entry.record.id)

    async def _make_room_on_disk(self, newest: Entry) -> None:
        """End the least recently used sessions until the folder has room for one more."""
        while True:
            others = [e for e in self._entries.values() if e.stored is not None and e is not newest]
            if newest.record.bytes + sum(entry.record.bytes for entry in others) <= self.disk:
                return
            entry = least_used(others)
            if entry is None:
                raise OSError(f"it takes {newest.record.bytes:,} bytes, and sessions may take {self.disk:,} on disk")
            await self._end(entry)

    async def _end(self, entry: Entry) -> None:
        self._forget(entry, for_good=True)
        if self.files is not None:  # to its end, also if the request that deletes is cancelled
            await asyncio.shield(self._task(self._in_worker(self.files.delete, entry.record.id)))

    async def _expire(self, entry: Entry, now: float) -> None:
        """End a session that nothing used, unless another process that shares the folder used it."""
        if self.files is not None and entry.stored is not None:
            used = await self._in_worker(self.files.delete_unused, entry.record.id, now - self.ttl)
            if used is not None:
                entry.used = max(entry.used, used)
        if self._expired(entry, now):
            self._forget(entry)

    def _expired(self, entry: Entry, now: float) -> bool:
        return now - entry.used > self.ttl

    def _is_here(self, entry: Entry) -> bool:
        return self._entries.get(entry.record.id) is entry

    def _forget(self, entry: Entry, *, for_good: bool = False) -> None:
        """Drop an entry. for_good: the session was deleted, so a request that runs must not bring it back."""
        if self._is_here(entry):
            del self._entries[entry.record.id]
        if for_good:
            self._deleted[entry.record.id] = None
            if len(self._deleted) > MOST_REMEMBERED:
                del self._deleted[next(iter(self._deleted))]

    def _touch(self, entry: Entry) -> None:
        entry.used = self.clock()
        if self.files is not None and entry.stored is not None:
            self._task(self._in_worker(self.files.touch, entry.record.id, entry.used))

    async def _in_worker(self, function: Callable[..., R], *arguments: Any) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)

    def _task(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ApiError):
            log.error("work on the files of sessions failed", exc_info=error)

    async def _sweep_regularly(self) -> None:
        while True:
            await asyncio.sleep(min(60.0, max(1.0, self.ttl / 4)))
            try:
                await self.sweep()
            except Exception:
                log.exception("ending expired sessions failed")


def not_found(session_id: object, param: str = "session_id") -> ApiError:
    """The same for a session that does not exist, has ended, or belongs to another key."""
    return ApiError(404, f"there is no session {quoted(session_id)}", code="session_not_found", param=param)
