"""Records: what is known about one HTTP request, for its log line and for metrics."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """One HTTP request. `began` is of time.perf_counter; all times are in seconds.

    route: the path's template, because a path may hold the id of a session. key: the id of the API key. label: the
    client's own X-Request-Id, which identifies nothing. queue_seconds, first_token_seconds: of the first output.
    prompts: their texts, for a server that logs them.
    """

    request_id: str
    method: str
    route: str = "none"
    key: str = ""
    label: str | None = None
    status: int = 0
    error: str | None = None
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


RECORD: ContextVar[Record | None] = ContextVar("record", default=None)
