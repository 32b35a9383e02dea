"""Files of sessions: a folder with one safetensors file per session, which several servers may share.

    <id>.safetensors   a snapshot (`retnet.models.snapshot`); its extra text is the record, its attachment the messages
    damaged/           files that could not be read, set aside
    secret             32 random bytes, for the hashes that bind sessions to API keys
    .lock              held while a file is replaced or deleted

A file is written whole under another name and renamed, so after a crash it is the old session or the new one. The time
of its last modification says when the session was last used. Of two servers that write the same session, the one with
the higher revision wins; of equal revisions, the last. Names of files come from ids that match a strict pattern.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retnet.models.snapshot import EXTRA, FORMAT, SnapshotFile
from retnet.models.snapshot_file import opened
from retnet.serve.http.sessions.record import ID_PATTERN, Record, Session
from retnet.system.files import flush
from retnet.system.lock import waiting_for_lock

RECORD = "session"  # the name of the record among the extra texts of a snapshot's file
SUFFIX = ".safetensors"
_UNFINISHED = re.compile(r"\.(secret|sess_[0-9a-f]{40})\.[0-9a-f]{8}\.part")  # as `secret` and `save` name them
ABANDONED_SECONDS = 3600.0  # age of an unfinished file whose writer has ended
log = logging.getLogger("retnet.serve")


class Damaged(ValueError):
    """A session's file cannot be read; it was set aside."""


class Deleted(Exception):
    """A session was deleted by another server that shares the folder."""


class Replaced(Exception):
    """A session has a newer revision on disk, from another server that shares the folder."""

    def __init__(self, record: Record):
        super().__init__("a newer revision is on disk")
        self.record = record


class SessionFiles:
    """The folder of the sessions. Every method blocks; any thread may call any of them.

    The folder is made if missing, for its owner alone. Raises OSError if it cannot be used.
    """

    def __init__(self, folder: Path):
        self.folder, self.aside, self._lock = folder, folder / "damaged", folder / ".lock"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.now = time.time
        self._known: dict[str, tuple[tuple[int, ...], Record]] = {}  # by id: what identifies a file, and its record

    def secret(self) -> bytes:
        """The secret of the folder; the first server makes it."""
        path = self.folder / "secret"
        with waiting_for_lock(self._lock):
            if not path.exists():
                staged = self.folder / f".secret.{secrets.token_hex(4)}.part"
                with private_file(staged) as file:
                    file.write(secrets.token_bytes(32))
                flush(staged)
                os.replace(staged, path)
                flush(self.folder)
            secret = path.read_bytes()
        if len(secret) != 32:
            raise OSError(f"{path} has {len(secret)} bytes; accepted: 32. Without them no session can be opened")
        return secret

    def scan(self) -> list[tuple[Record, float]]:
        """Every session's record and the time of its last use. Damaged files are set aside."""
        found, known = [], {}
        for item in os.scandir(self.folder):
            session_id = item.name.removesuffix(SUFFIX)
            if item.name == session_id or not ID_PATTERN.fullmatch(session_id):
                self._remove_if_abandoned(item)
                continue
            try:
                status = item.stat(follow_symlinks=False)
                identity = (status.st_ino, status.st_size, status.st_ctime_ns)
                before = self._known.get(session_id)
                record = before[1] if before is not None and before[0] == identity else self._record(session_id)
            except FileNotFoundError:  # deleted meanwhile
                continue
            except OSError as error:
                log.error("%s cannot be read and is left out: %s", item.path, error)
                continue
            if record is not None:
                known[session_id] = identity, record
                found.append((record, status.st_mtime))
        self._known = known
        return found

    def look(self, session_id: str) -> tuple[Record, float] | None:
        """A session's record and the time of its last use, from the head of its file. None if there is no file."""
        try:
            used = self._path(session_id).stat().st_mtime
            record = self._record(session_id)
        except FileNotFoundError:
            return None
        return None if record is None else (record, used)

    def read(self, session_id: str) -> Session | None:
        """A session, checked against the digest of its file. None if there is none; raises Damaged."""
        path = self._path(session_id)
        with suppress(FileNotFoundError):
            before = path.stat()
            try:
                file = SnapshotFile.load(path)
                record = Record.from_json(file.extra[RECORD])
                messages = json.loads(file.attachment) if file.attachment else None
            except (ValueError, KeyError, RecursionError) as error:
                self._set_aside(path, before, error)
                raise Damaged(f"the file of session {session_id} is damaged") from error
            return Session(record, file.snapshot, messages)
        return None

    def write(self, session: Session, used: float, was_there: bool) -> None:
        """Write a session, last used at `used`, so that its file is whole at every moment.

        was_there: whether it had a file. Raises Deleted if that is gone, Replaced if a newer revision is there.
        """
        path = self._path(session.id)
        staged = path.with_name(f".{session.id}.{secrets.token_hex(4)}.part")
        attachment = b"" if session.messages is None else json.dumps(session.messages).encode()
        try:
            with private_file(staged) as file:
                for piece in session.snapshot.pieces(extra={RECORD: session.record.to_json()}, attachment=attachment):
                    file.write(piece)
            os.utime(staged, (used, used))
            flush(staged)
            with waiting_for_lock(self._lock):
                if was_there and not path.exists():
                    raise Deleted
                there = self.look(session.id)  # None for a damaged file, which is then set aside
                if there is not None and there[0].revision > session.record.revision:
                    raise Replaced(there[0])
                os.replace(staged, path)
            flush(self.folder)
        finally:
            staged.unlink(missing_ok=True)

    def touch(self, session_id: str, used: float) -> None:
        """Note the time of a use, unless the file is gone."""
        with suppress(FileNotFoundError):
            os.utime(self._path(session_id), (used, used))

    def delete(self, session_id: str) -> None:
        with waiting_for_lock(self._lock):
            self._path(session_id).unlink(missing_ok=True)
        flush(self.folder)

    def delete_unused(self, session_id: str, since: float) -> float | None:
        """Delete a session that was not used since a time. Returns the time of its last use if it stays."""
        path = self._path(session_id)
        with waiting_for_lock(self._lock), suppress(FileNotFoundError):
            used = path.stat().st_mtime
            if used >= since:
                return used
            path.unlink()
        return None

    def _record(self, session_id: str) -> Record | None:
        """The record in the head of a file; None if the file is damaged, which sets it aside."""
        path = self._path(session_id)
        before = path.stat()
        try:
            with opened(path) as file:  # checks the head, and the file's size against it
                metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}; accepted: {FORMAT!r}")
            record = Record.from_json(metadata[EXTRA + RECORD])
            if record.id != session_id:
                raise ValueError("it is the file of another session")
        except (SafetensorError, ValueError, KeyError) as error:
            self._set_aside(path, before, error)
            return None
        return record

    def _set_aside(self, path: Path, status: os.stat_result, error: Exception) -> None:
        """Move a damaged file away, unless it has been replaced since it had this status."""
        with suppress(FileNotFoundError):
            if os.path.samestat(status, path.stat()):
                log.error("%s is damaged and is set aside in %s: %s", path, self.aside, error)
                self.aside.mkdir(mode=0o700, exist_ok=True)
                os.replace(path, self.aside / path.name)

    def _remove_if_abandoned(self, item: os.DirEntry[str]) -> None:
        """Remove an unfinished file that a server left when it was killed."""
        with suppress(FileNotFoundError):
            if _UNFINISHED.fullmatch(item.name) and self.now() - item.stat().st_ctime > ABANDONED_SECONDS:
                os.unlink(item.path)

    def _path(self, session_id: str) -> Path:
        if not ID_PATTERN.fullmatch(session_id):
            raise ValueError("a session's id was not checked before its file was named")
        return self.folder / f"{session_id}{SUFFIX}"


def private_file(path: Path) -> Any:
    """A new file to write, which its owner alone may read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
