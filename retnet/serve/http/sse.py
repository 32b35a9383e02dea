"""Server-sent events: the events of a streamed response, and what happens to its requests when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Message, Receive, Scope, Send

from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Stream

R = TypeVar("R")
KEEP_ALIVE_SECONDS = 15.0  # proxies commonly close connections that are silent for 30 or 60 seconds
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the latter: nginx passes events on at once
log = logging.getLogger("retnet.serve")


def event(data: Any) -> bytes:
    """One event with JSON data."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response of events, `text/event-stream`.

    events: yields events, and is closed when the client leaves. An ApiError that it raises becomes an error event and
    ends the response; so does any other exception, whose text is logged and not sent.
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
        self._sent = 0  # events
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(client_left(receive))
        work = asyncio.ensure_future(self._send_all(send))
        try:
            while True:
                sent = self._sent
                done, _ = await asyncio.wait((left, work), timeout=self._keep_alive, return_when="FIRST_COMPLETED")
                if done:
                    break
                if sent == self._sent and not self._sending:
                    await send(_part(KEEP_ALIVE))
            if work.done():
                work.result()
        finally:
            for stream in self._streams:
                stream.cancel()
            await _end(left, work)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._events:
                self._sending = True
                await send(_part(data))
                self._sending = False
                self._sent += 1
        except ApiError as error:
            await send(_part(event(error.body())))
        except Exception:
            log.exception("a stream failed")
            await send(_part(event(ApiError(500, "the server failed on this request").body())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_left(request: Request, work: Coroutine[Any, Any, R]) -> R | None:
    """The result of `work`, which is cancelled when the client leaves; then None."""
    left = asyncio.ensure_future(client_left(request.receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((left, task), return_when="FIRST_COMPLETED")
        return task.result() if task.done() else None
    finally:
        await _end(left, task)


async def client_left(receive: Receive) -> None:
    """Wait until the client closes its side of the connection."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks that run, and wait for their cleanup."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}
