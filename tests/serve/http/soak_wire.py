"""HTTP over plain sockets, for clients of the soak that do what no library does."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

SECONDS = 120.0  # for any answer
# The server's limits for heads to arrive and for answers to be read. Clients that mean no harm are within them on a
# machine that is so busy that they stand still for seconds.
STALL_SECONDS = 10.0


@dataclass
class Answer:
    """A whole response. status: 0 if the connection ended before it was whole."""

    status: int
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of a stream's events; the end mark is None."""
        found = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part.startswith(b"data: ")]
        return [None if data == b"[DONE]" else json.loads(data) for data in found]


def request(method: str, path: str, port: int, key: str, body: bytes = b"", kind: str = "application/json") -> bytes:
    """The bytes of a request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    if body or method == "POST":
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Wire:
    """One connection: `async with Wire(port) as wire`. It is reset at the end if `reset`."""

    def __init__(self, port: int, reset: bool = False):
        self.port, self.reset = port, reset

    async def __aenter__(self) -> Wire:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        if self.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.reader, self.writer = await asyncio.open_connection(sock=connection, limit=2**16)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.reset:
            self.writer.transport.abort()
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, data: bytes, rng: random.Random | None = None) -> None:
        """Send at once, or in a few parts with pauses if there is a generator."""
        cuts = [0, len(data)] if rng is None else [0, *sorted(rng.choices(range(len(data)), k=3)), len(data)]
        with suppress(OSError):  # an answer may come before the request is whole, and the connection close
            for begin, end in pairwise(cuts):
                self.writer.write(data[begin:end])
                await self.writer.drain()
                if rng is not None:
                    await asyncio.sleep(rng.random() * 0.05)

    async def answer(self, pause: float = 0.0) -> Answer:
        """The response, or what there is of it. pause: seconds in its middle in which nothing is read."""
        try:
            async with asyncio.timeout(SECONDS + pause):
                return await self._answer(pause)
        except (OSError, asyncio.IncompleteReadError, ValueError, IndexError):
            return Answer(0)

    async def _answer(self, pause: float) -> Answer:
        head = await self.reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        if b"chunked" not in fields.get(b"transfer-encoding", b""):
            body = await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
            return Answer(status, body)
        parts = []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            parts.append((await self.reader.readexactly(size + 2))[:-2])
            if pause:
                await asyncio.sleep(pause)
                pause = 0.0
        await self.reader.readuntil(b"\r\n")
        return Answer(status, b"".join(parts))


async def ask(data: bytes, port: int) -> Answer:
    """The answer to a request on a connection of its own."""
    async with Wire(port) as wire:
        await wire.send(data)
        return await wire.answer()
