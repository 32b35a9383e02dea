"""Server-sent events: a response that is sent as it comes.

The guard cancels the response of a client that leaves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from retnet.serve.http.access.record import RECORD
from retnet.serve.http.errors import ApiError
from retnet.serve.http.stream import Stream

KEEP_ALIVE_SECONDS = 15.0  # proxies commonly close connections that are silent for 30 or 60 seconds
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # the latter: nginx passes events on at once


def event(data: Any) -> bytes:
    """One event with JSON data."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response of events, `text/event-stream`. While there are none, it sends comments that clients skip.

    events: yields events. An ApiError that it raises becomes an error event, which ends the response.
    streams: cancelled when the response ends, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        streams: Iterable[Stream],
        *,
        headers: Mapping[str, str] | None = None,
        keep_alive: float = KEEP_ALIVE_SECONDS,
    ):
        super().__init__(headers={**HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._events, self._streams, self._keep_alive = events, list(streams), keep_alive
        self._num_sent = 0
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        alive = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            alive = asyncio.ensure_future(self._send_comments(send))
            try:
                async for data in self._events:
                    self._sending = True
                    await send(_part(data))
                    self._sending = False
                    self._num_sent += 1
            except ApiError as error:
                record = RECORD.get()
                if record is not None:
                    record.error = error.message
                await send(_part(event(error.body())))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for stream in self._streams:
                stream.cancel()
            if alive is not None:
                alive.cancel()
            await self._events.aclose()

    async def _send_comments(self, send: Send) -> None:
        """Send a comment whenever nothing was sent for a while, except to a client that does not read."""
        while True:
            num_sent = self._num_sent
            await asyncio.sleep(self._keep_alive)
            if num_sent == self._num_sent and not self._sending:
                await send(_part(KEEP_ALIVE))


def _part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


class Answer(Protocol):
    """What an endpoint has to say, in one of two forms."""

    def events(self) -> AsyncGenerator[bytes, None]: ...

    async def whole(self) -> dict[str, Any]: ...


async def responded(answer: Answer, streams: Sequence[Stream], *, as_events: bool) -> Response:
    """The response with an answer. The streams are cancelled when it ends, however it ends."""
    if as_events:
        return EventStream(answer.events(), streams)
    try:
        return JSONResponse(await answer.whole())
    finally:
        for stream in streams:
            stream.cancel()
