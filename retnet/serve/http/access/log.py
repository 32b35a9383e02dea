"""The server's log: one JSON object per line, without keys, and without prompts unless they are asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

from retnet.serve.http.access.record import Record

LOGGER = "retnet.serve"
QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})  # of probes, several per minute
_log = logging.getLogger(LOGGER)


class JsonFormatter(logging.Formatter):
    """A log record as a line of JSON. Of an exception it gives the type and the places, not the message, which can
    quote what a client sent."""

    def __init__(self, show_messages: bool = False):
        super().__init__()
        self.show_messages = show_messages

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info is not None and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["exception"] = type(error).__name__
            if self.show_messages or getattr(record, "shows_message", False):
                line["message"] = str(error)
            line["traceback"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
            ]
        return json.dumps(line, ensure_ascii=True, default=str)


def configure_log(stream: TextIO | None = None, *, quiet: bool = False, prompts: bool = False) -> None:
    """Send the log of the server and of uvicorn to a stream (standard error by default). quiet: warnings only."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(show_messages=prompts))
    for name, level in ((LOGGER, logging.WARNING if quiet else logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log_request(record: Record) -> None:
    """One line for a request that ended."""
    level = logging.DEBUG if record.route in QUIET_ROUTES and record.status == 200 else logging.INFO
    if not _log.isEnabledFor(level):
        return
    fields = {
        "request": record.request_id,
        "label": record.label,
        "key": record.key or None,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "error": record.error,
        "total_ms": _milliseconds(record.seconds),
    }
    if record.finish_reasons:
        fields |= {
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "new_tokens": record.new_tokens,
            "finish": record.finish_reasons,
            "queue_ms": _milliseconds(record.queue_seconds),
            "first_token_ms": _milliseconds(record.first_token_seconds),
        }
    if record.prompts:
        fields["prompts"] = record.prompts
    known = {name: value for name, value in fields.items() if value is not None}
    _log.log(level, "request", extra={"fields": known})


def log_failure(event: str, error: BaseException, record: Record) -> None:
    """An exception that no code expected, with the request that met it."""
    _log.error(event, exc_info=error, extra={"fields": {"request": record.request_id}})


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
