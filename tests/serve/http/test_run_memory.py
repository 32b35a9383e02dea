"""Host memory, files, tasks and threads over thousands of requests."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from retnet.serve.http.settings import Settings
from retnet.system.memory import resident_bytes
from tests.serve.http.server import LiveServer, live_server

WARM, MORE, CLIENTS = 1200, 3000, 6  # requests before the first look, between the looks, and clients at a time


def use(client: httpx.Client, i: int) -> None:
    """One request of many kinds: whole, streamed, left early, refused, too large, not there."""
    body = {"model": "tiny", "prompt": [i % 200, 7, 8], "max_tokens": 4, "ignore_eos": True, "seed": i}
    kind = i % 8
    if kind == 0:
        assert client.post("/v1/completions", json=body | {"logprobs": 2}).status_code == 200
    elif kind in (1, 2):
        text = client.post("/v1/completions", json=body | {"stream": True, "stop": ["zzz"]}).text
        assert text.endswith("data: [DONE]\n\n")
    elif kind == 3:
        with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 400}) as response:
            next(response.iter_bytes())
    elif kind == 4:
        assert client.post("/v1/completions", json=body | {"temperature": "hot"}).status_code == 400
    elif kind == 5:
        assert client.post("/v1/completions", json=body | {"prompt": [300]}).status_code == 400
    elif kind == 6:
        assert (
            client.post("/v1/completions", content=b"x" * 3000, headers={"x-request-id": f"id{i}"}).status_code == 413
        )
    else:
        assert client.get(f"/none/{i}", headers={"x-request-id": f"id{i}"}).status_code == 404
        assert client.get("/metrics").status_code == 200


def load(live: LiveServer, begin: int, count: int) -> None:
    def run(first: int) -> None:
        with httpx.Client(base_url=live.url, timeout=60) as client:
            for i in range(begin + first, begin + count, CLIENTS):
                use(client, i)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(run, range(CLIENTS)))
    end = time.monotonic() + 10
    while live.service.num_streams or live.service.num_exchanges or live.server.server_state.connections:
        assert time.monotonic() < end
        time.sleep(0.01)


def counts() -> dict[str, int]:
    gc.collect()
    gc.collect()
    return {
        "objects": len(gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux' /proc")
def test_thousands_of_requests_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr("retnet.serve.prefix.TREE_BYTES", 2**13)  # so that the tree of earlier prompts is full at once
    with live_server(Settings(max_body=2000), prefix_cache_bytes=2**20, prompt_chunk=64) as live:
        load(live, 0, WARM)
        before, resident = counts(), resident_bytes()
        load(live, WARM, MORE)
        after, grown = counts(), resident_bytes() - resident
        assert not live.service._streams
        assert not live.service._queued
        assert len(live.service._mailboxes) == 1
        assert not live.server.server_state.tasks
    assert after["objects"] - before["objects"] < MORE / 10, (before, after)
    assert abs(after["files"] - before["files"]) <= 2
    assert after["threads"] <= before["threads"] + 1
    assert grown < 2**23, f"{grown:,} bytes"


def test_a_request_is_freed_when_it_ends_and_leaves_no_cycles_to_the_garbage_collector():
    """A full collection takes a tenth of a second in a process with torch, in which no token comes."""
    kinds = [
        {"model": "tiny", "prompt": [1], "max_tokens": 4, "stream": stream} | change
        for stream in (False, True)
        for change in ({}, {"temperature": "hot"}, {"prompt": [300]})
    ]
    with live_server() as live, closing(HTTPConnection("127.0.0.1", live.port)) as connection:

        def ask() -> None:
            for body in kinds:
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                connection.getresponse().read()

        ask()
        time.sleep(0.05)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            ask()
            time.sleep(0.05)
            gc.collect()
            found = sorted({f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage})
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert [name for name in found if name.startswith(("retnet.", "uvicorn.", "fastapi.", "_asyncio."))] == []
