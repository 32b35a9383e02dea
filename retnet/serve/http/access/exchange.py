"""Exchanges: one request and its response as ASGI messages, within limits of size and time.

The body of a JSON request is read before the application runs. From then on a watcher waits for the client to leave,
which cancels the task that serves it, wherever that is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress

from starlette.types import Message, Receive, Scope, Send

from retnet.serve.http.errors import ApiError

LINGER_SECONDS, LINGER_BYTES = 1.0, 2**24  # to receive what a refused client still sends, so that it sees the answer
Headers = Sequence[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client left before its request was whole."""


class Exchange:
    """The messages of one request. `headers` join those of its response, unless the application sets the same.

    limit: bytes of the body. seconds: for the whole body, or between two parts of a body that is read as it comes.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, headers: Headers, limit: int, seconds: float):
        self.status = 0
        self.complete = self.gone = False
        self._receive, self._send, self._headers = receive, send, headers
        self.limit, self._seconds = limit, seconds
        self._without_body = scope["method"] == "HEAD"
        self._asks_first = any(name == b"expect" for name, _ in scope["headers"])  # whether to send its body
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._body: bytes | None = None
        self._num_read = 0
        self._unsent: int | None = None  # bytes of a response that says how many it has
        self._body_ended = self._streams_events = False
        self._left = asyncio.Event()

    async def read_body(self) -> bytes:
        """The whole body, which `receive` then hands over in one message.

        Raises ApiError (413, 408) and ClientGone.
        """
        parts = []
        try:
            async with asyncio.timeout(self._seconds):
                while not self._body_ended:
                    parts.append(await self._next_part())
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._seconds:g} s") from None
        self._body = b"".join(parts)
        return self._body

    async def receive(self) -> Message:
        """For the application: the body, then the client's leaving."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._body_ended:
            await self._left.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout(self._seconds):
                part = await self._next_part()
        except TimeoutError:
            raise ApiError(408, f"no part of the body arrived within {self._seconds:g} s") from None
        except ClientGone:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": not self._body_ended}

    async def send(self, message: Message) -> None:
        """For the application: its response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = self._all_headers(list(message.get("headers", ())))
            self._unsent = next((int(value) for name, value in headers if name.lower() == b"content-length"), None)
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            if self._unsent is not None:
                self._unsent -= len(message.get("body", b""))
            # A client that has all bytes may leave before it is told that there are no more.
            if not message.get("more_body", False) or (self._unsent is not None and self._unsent <= 0):
                self.complete = True
            if self._without_body:
                message = {**message, "body": b""}
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """End with an error: as the response, as an event of a stream that has begun, or by closing the connection."""
        if self.complete or self.gone:
            return
        if not self.status:
            await self._linger()
            await error.response()({"type": "http"}, self.receive, self.send)
        elif self._streams_events:
            event = b"data: " + json.dumps(error.body(), ensure_ascii=False).encode() + b"\n\n"
            await self.send({"type": "http.response.body", "body": event, "more_body": False})

    def close(self) -> None:
        """Stop watching for the client, and let go of both tasks: they refer to this exchange."""
        if self._watcher is not None:
            self._watcher.cancel()
        self._watcher = self._task = None

    async def _next_part(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
            raise ClientGone
        part = message.get("body", b"")
        self._num_read += len(part)
        if not message.get("more_body", False):
            self._body_ended = True
            self._watcher = asyncio.get_running_loop().create_task(self._watch())
        if self._num_read > self.limit:
            raise ApiError(413, f"the body is larger than {self.limit:,} bytes, which this server accepts")
        return part

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left.set()
        if not self.complete and self._task is not None:
            self.gone = True
            self._task.cancel()

    async def _linger(self) -> None:
        """Receive the rest of a body that nobody reads: closing the connection before would reset it."""
        if self._asks_first:
            return
        self.limit = self._num_read + LINGER_BYTES
        with suppress(TimeoutError, ClientGone, ApiError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self._body_ended:
                    await self._next_part()

    def _all_headers(self, own: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        names = {name.lower() for name, _ in own}
        self._streams_events = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in own
        )
        if not self._body_ended:  # the rest of the body is not read, so the connection cannot be used again
            own.append((b"connection", b"close"))
        return own + [header for header in self._headers if header[0] not in names]
