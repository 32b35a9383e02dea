"""Entries of the store of sessions: what it knows of each session, and which of them goes first."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from retnet.serve.http.sessions.record import Record, Session


@dataclass(eq=False)
class Entry:
    """A session of the store: its newest revision, when it was last used, and where it lies.

    session: None if it is on disk only. stored: the revision on disk. error: why the last attempt to write failed.
    """

    record: Record
    used: float
    session: Session | None = None
    stored: int | None = None
    writing: asyncio.Task[None] | None = field(default=None, repr=False)
    loading: asyncio.Task[Session] | None = field(default=None, repr=False)
    error: str | None = None

    @property
    def is_stored(self) -> bool:
        return self.stored == self.record.revision


def least_used(entries: Sequence[Entry]) -> Entry | None:
    """The least recently used session of the owner whose sessions take the most bytes.

    So one who fills a budget loses their own sessions first. None of none.
    """
    if not entries:
        return None
    taken: Counter[str] = Counter()
    for entry in entries:
        taken[entry.record.owner] += entry.record.bytes
    owner = max(taken, key=lambda owner: taken[owner])
    return min((e for e in entries if e.record.owner == owner), key=lambda entry: entry.used)
