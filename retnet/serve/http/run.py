"""Runs a service behind uvicorn until it is told to end.

SIGTERM or SIGINT: the server takes no more requests (503) and is not ready, while those that run may finish within the
grace period. What is left then ends: with an error, or cut where it is if its session is kept. A second signal exits at
once. The exit code is 0 after a signal and 1 if the engine's thread ended.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn
from fastapi import FastAPI

from retnet.serve.http.access.guard import SHUTTING_DOWN
from retnet.serve.http.service import Service
from retnet.serve.http.settings import Settings

HEADER_SECONDS = 15.0  # for the head of a request
STALL_SECONDS = 60.0  # for a client that reads nothing of what is written to it
HALF_CLOSED_SECONDS = 2.0  # for a client that reads nothing of the rest of a response, on a connection that is closing
KEEP_ALIVE_SECONDS = 30
FINISH_SECONDS = 5.0  # for handlers to end after their requests were ended
MOST_CONNECTIONS = 4096
SWITCH_SECONDS = 0.0001  # after which the engine's thread gets Python's lock from the event loop
log = logging.getLogger("retnet.serve")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket for the address, so that one that is taken fails before a model is loaded. Raises OSError."""
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{error.strerror} ({host}, port {port})") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it ends and closes connections that do nothing."""

    def __init__(self, app: FastAPI, settings: Settings):
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # it limits the head of a request; httptools is faster and reads heads of any size
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=True,
                ws="none",
                lifespan="on",
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(FINISH_SECONDS),
                limit_concurrency=MOST_CONNECTIONS,
            )
        )
        self.service: Service = app.state.service
        self.settings = settings
        self.exit_code = 0
        self.on_started: Callable[[], None] = lambda: None
        self._draining_since: float | None = None
        self._ended_at: float | None = None
        self._connections = Connections()

    def drain(self) -> None:
        """Take no more requests, and end when those that run have finished, or after the grace period."""
        if self._draining_since is None:
            self._draining_since = time.monotonic()
            self.service.draining = True
            log.info(
                "draining", extra={"fields": {"requests": self.service.num_streams, "grace_s": self.settings.grace}}
            )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.service.on_failure = lambda: loop.call_soon_threadsafe(self._on_engine_failure)
        await super().startup(sockets)
        self.on_started()

    async def on_tick(self, counter: int) -> bool:
        self._connections.look(self.server_state.connections)
        if self._draining_since is not None and not self.should_exit:
            await self._end_if_drained(time.monotonic() - self._draining_since)
        return await super().on_tick(counter)

    async def _end_if_drained(self, seconds: float) -> None:
        idle = not self.service.num_streams and not self.service.num_exchanges
        if not idle and seconds >= self.settings.grace and self._ended_at is None:
            self._ended_at = time.monotonic()
            if self.service.alive:
                await self.service.end_all(SHUTTING_DOWN)
        if idle or (self._ended_at is not None and time.monotonic() - self._ended_at > FINISH_SECONDS):
            self.should_exit = True

    def _on_engine_failure(self) -> None:
        self.exit_code = 1
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining_since is not None:
            os._exit(128 + sig)
        self.drain()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was handled does not end the process after all."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


class Connections:
    """Watches the connections of a server, and closes those that do nothing for too long.

    The limits in seconds: for the head of a request to arrive, for a client to read anything of what is written to it,
    and the same for the rest of a response when the connection is closing. A client that reads slowly gets everything.
    """

    def __init__(self, head: float = HEADER_SECONDS, stall: float = STALL_SECONDS, half: float = HALF_CLOSED_SECONDS):
        self.limits = {"head": head, "stall": stall, "half": half}
        self._since: WeakKeyDictionary[Any, tuple[tuple[str, int], float]] = WeakKeyDictionary()

    def look(self, connections: set[Any]) -> None:
        """Look at the protocols of all connections (uvicorn's); called several times per second."""
        now = time.monotonic()
        for connection in list(connections):
            state = _stuck_in(connection)
            before, since = self._since.get(connection, (None, now))
            if state is None:
                self._since.pop(connection, None)
            elif state != before:
                self._since[connection] = state, now
            elif now - since > self.limits[state[0]]:
                connection.transport.abort()


def _stuck_in(connection: Any) -> tuple[str, int] | None:
    """What a connection waits for that its client may never do, and the bytes that are not yet written to it."""
    if connection.transport is None:
        return None
    unwritten = connection.transport.get_write_buffer_size()
    if connection.transport.is_closing():
        return "half", unwritten
    if connection.flow.write_paused:
        return "stall", unwritten
    in_request = connection.cycle is not None and not connection.cycle.response_complete
    return None if in_request or connection.timeout_keep_alive_task is not None else ("head", unwritten)


def serve(app: FastAPI, settings: Settings, listener: socket.socket, on_started: Callable[[], None]) -> int:
    """Serve until a signal or a failure; returns the exit code."""
    _allow_many_files()
    server = Server(app, settings)
    server.on_started = on_started
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # a full collection would look at all of torch's objects, for a tenth of a second
    try:
        server.run(sockets=[listener])
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)
    return server.exit_code


def _allow_many_files() -> None:
    """Raise the limit of open files, which are connections here, to what the system allows this process."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else min(2 * MOST_CONNECTIONS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
