"""A server over a tiny byte model, in the process of the test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from starlette.testclient import TestClient

from retnet.data.tokenizer import ByteTokenizer
from retnet.serve.engine import Engine
from retnet.serve.http.app import create_app
from retnet.serve.http.run import Server, bound_socket
from retnet.serve.http.service import Service
from retnet.serve.http.settings import Settings
from tests.small_models import BYTES, small_model

MODEL_NAME = "tiny"


@dataclass
class LiveServer:
    """A server that runs in a thread of this process."""

    server: Server
    service: Service
    port: int
    url: str


def tiny_service(settings: Settings | None = None, stack: str = "retention", **engine_options: Any) -> Service:
    """A service over a byte model with 4 slots; `engine_options` are those of Engine."""
    tokenizer = ByteTokenizer()
    options = {"num_slots": 4, "max_tokens": 512, "decode": tokenizer.decode} | engine_options
    return Service(Engine(small_model(stack, **BYTES), **options), tokenizer, MODEL_NAME, settings)


@contextmanager
def tiny_server(settings: Settings | None = None, **options: Any) -> Iterator[TestClient]:
    """A client of a server whose engine's thread runs; options as for `tiny_service`."""
    app = create_app(tiny_service(settings, **options))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client


@contextmanager
def live_server(settings: Settings | None = None, **options: Any) -> Iterator[LiveServer]:
    """A server with real sockets, on a free port of this machine; options as for `tiny_service`."""
    settings = settings or Settings()
    service = tiny_service(settings, **options)
    listener = bound_socket("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a client that does not read is noticed
    server = Server(create_app(service), settings)
    started = Event()
    server.on_started = started.set
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert started.wait(30)
    port = listener.getsockname()[1]
    try:
        yield LiveServer(server, service, port, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
