"""Records of sessions: the facts beside the state, which their files carry."""

from __future__ import annotations

import json
import math
import re
import secrets
from dataclasses import asdict, dataclass, fields
from typing import Any

from retnet.models.snapshot import Snapshot
from retnet.system.checks import is_integer, is_number

ID_PATTERN = re.compile(r"sess_[0-9a-f]{40}")


def new_id() -> str:
    """160 random bits: nobody guesses one, and no two are equal."""
    return f"sess_{secrets.token_hex(20)}"


@dataclass(frozen=True)
class Record:
    """Facts of one revision of a session.

    owner: a keyed hash of the id of the API key that made the session. model: fingerprint of its model.
    created: of the session, in seconds since the epoch. foreign: whether its state, or that of an ancestor, was
    uploaded. parent: the session that it was forked from. bytes: of state, tokens and messages. ended: whether its last
    token ended the output, and so is no part of the text that the client got.
    """

    id: str
    owner: str
    model: str
    revision: int
    created: float
    foreign: bool
    parent: str | None
    tokens: int
    bytes: int
    ended: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError for text that `to_json` did not make."""
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise ValueError("its record is not that of a session") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"its record is not that of a session; accepted: {', '.join(sorted(names))}")
        counts = all(is_integer(data[name], 0) for name in ("revision", "tokens", "bytes"))
        texts = all(isinstance(data[name], str) for name in ("id", "owner", "model"))
        parent = data["parent"] is None or isinstance(data["parent"], str)
        created = is_number(data["created"], 0, math.inf)
        flags = all(isinstance(data[name], bool) for name in ("foreign", "ended"))
        if not (counts and texts and parent and created and flags):
            raise ValueError("its record has a value of another type")
        ids = [data["id"], data["parent"]] if data["parent"] is not None else [data["id"]]
        if not all(ID_PATTERN.fullmatch(value) for value in ids):
            raise ValueError("its record names no session's id")
        return cls(**data)


@dataclass(frozen=True, eq=False)
class Session:
    """One revision of a session: a state, the messages of the conversation (None if it has none), and its record.

    Nothing in it changes. Its snapshot is on the CPU.
    """

    record: Record
    snapshot: Snapshot
    messages: list[dict[str, Any]] | None = None

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def foreign(self) -> bool:
        return self.record.foreign
