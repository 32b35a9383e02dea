"""A server with real sockets: clients that leave, stall or say nothing, and the end of the server."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import httpx
import pytest

from retnet.serve.http import run
from retnet.serve.http.app import create_app
from retnet.serve.http.settings import Settings
from retnet.serve.request import Status
from tests.serve.http.server import LiveServer, live_server, tiny_service

ENDLESS = 100_000_000  # tokens
LIMIT = 0.5  # seconds for a client to read anything


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def connect(live: LiveServer, path: str = "/v1/completions", headers: str = "", **body: object) -> socket.socket:
    """A connection on which a request was sent."""
    data = json.dumps({"model": "tiny", "prompt": [1, 2, 3], "max_tokens": ENDLESS, "ignore_eos": True} | body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", live.port))
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    client.sendall(f"{head}\r\n{headers}\r\n".encode() + data)
    return client


def statuses(live: LiveServer) -> list[Status]:
    return [generation.status for generation in list(live.service._streams)]


def is_free(live: LiveServer) -> bool:
    pool = live.service.engine.pool
    return not live.service.num_streams and pool.num_free == pool.num_slots and not live.service.num_exchanges


@pytest.fixture
def live() -> Iterator[LiveServer]:
    with live_server(Settings(max_new_tokens=ENDLESS), num_slots=1, max_tokens=None, prompt_chunk=64) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True], ids=["closed", "half-closed"])
def test_a_client_that_leaves_while_its_request_decodes_frees_the_slot(live, stream, half):
    with closing(connect(live, stream=stream)) as client:
        until(lambda: statuses(live) == [Status.DECODING])
        if half:
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
        until(lambda: is_free(live))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read_frees_the_slot(live, stream):
    with closing(connect(live, stream=stream, prompt=[1] * 300_000)):
        until(lambda: statuses(live) == [Status.READING])
    until(lambda: is_free(live))
    assert live.service.engine.stats().prompt_tokens < 300_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_not_served(live, stream):
    with closing(connect(live)) as first:
        until(lambda: statuses(live) == [Status.DECODING])
        with closing(connect(live, stream=stream)):
            until(lambda: statuses(live) == [Status.DECODING, Status.WAITING])
        until(lambda: statuses(live) == [Status.DECODING])
        first.close()
    until(lambda: is_free(live))


def test_a_client_that_leaves_in_the_middle_of_an_upload_is_no_failure(live, monkeypatch):
    failures = []
    monkeypatch.setattr("retnet.serve.http.access.guard.log_failure", lambda *arguments: failures.append(arguments))
    head = "POST /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream"
    with closing(socket.create_connection(("127.0.0.1", live.port))) as client:
        client.sendall(f"{head}\r\nContent-Length: 1000\r\n\r\n12345678".encode())
        until(lambda: live.service.num_exchanges)
    until(lambda: is_free(live))
    assert failures == []


def test_a_client_that_reads_nothing_loses_its_connection_and_its_slot(live):
    live.server._connections.limits["stall"] = 0.3
    with closing(connect(live, stream=True, logprobs=5, max_tokens=50_000)):
        until(lambda: statuses(live) == [Status.DECODING])
        until(lambda: is_free(live))


def test_a_client_that_closed_its_side_and_reads_nothing_is_gone_too(live):
    live.server._connections.limits["half"] = 0.2
    with closing(connect(live, stream=True, logprobs=5, max_tokens=50_000)) as client:
        until(lambda: any(each.flow.write_paused for each in live.server.server_state.connections))
        client.shutdown(socket.SHUT_WR)
        until(lambda: is_free(live))


@pytest.mark.parametrize("closes", [False, True], ids=["kept open", "closing"])
def test_a_client_that_reads_slowly_gets_the_whole_response(live, closes):
    """All of it takes longer than the limits, which are for reading anything."""
    live.server._connections.limits |= {"half": LIMIT, "stall": LIMIT}
    body = {"prompt": [1] * 3000, "max_tokens": 0, "echo": True, "logprobs": 5}
    with closing(connect(live, headers="Connection: close\r\n" if closes else "", **body)) as client:
        head, _, text = client.recv(4096).partition(b"\r\n\r\n")
        size = int(dict(line.lower().split(b": ") for line in head.split(b"\r\n")[1:])[b"content-length"])
        begin, step = time.monotonic(), size // 60 + 1
        while part := client.recv(min(step, size - len(text))):
            text += part
            time.sleep(LIMIT / 25)
        assert time.monotonic() - begin > 2 * LIMIT
    assert len(json.loads(text)["choices"][0]["logprobs"]["tokens"]) == 3000


def test_a_client_that_reads_nothing_does_not_hold_up_another():
    with live_server(Settings(max_new_tokens=ENDLESS), max_tokens=None) as live:
        with closing(connect(live, stream=True, logprobs=5, max_tokens=50_000)):
            until(lambda: any(each.flow.write_paused for each in live.server.server_state.connections))
            body = {"model": "tiny", "prompt": [1], "max_tokens": 5, "ignore_eos": True}
            answer = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == 5
        until(lambda: is_free(live))


def test_a_client_that_sends_no_request_or_half_of_one_is_closed(live):
    live.server._connections.limits["head"] = 0.2
    for part in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "):
        with closing(socket.create_connection(("127.0.0.1", live.port))) as client:
            client.sendall(part)
            client.settimeout(5)
            try:
                assert client.recv(100) == b""
            except ConnectionResetError:
                continue


JSON = "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
GARBAGE = {
    "GET /health HTTP/1.0\n": 400,  # no Host
    "GET /health HTTP/1.1\nHost: localhost\nX: " + "a" * 200_000: 400,
    "GET /health HTTP/1.1\nHost: localhost\nAuthorization: Bearer \xff\nX-Request-Id: \xff\n": 200,
    "GET /health HTTP/1.1\nHost: \xe2\x82\xac\n": 403,
    "GET /v1/%00%ff/../x HTTP/1.1\nHost: localhost\n": 404,
    "GET http://evil.example/health HTTP/1.1\nHost: localhost\n": 404,
    "CONNECT localhost:80 HTTP/1.1\nHost: localhost\n": 404,
    "PRI * HTTP/2.0\n\nSM\n": 400,
    "\x16\x03\x01\x02\x00\x01\x00\n": 400,
    JSON + "Content-Length: 5\nTransfer-Encoding: chunked\n\n0\n": 400,
    JSON + "Content-Length: 5\nContent-Length: 6\n\n{}": 400,
    JSON + "Content-Length: 99999999999\nExpect: 100-continue\n": 413,
    JSON + "Transfer-Encoding: chunked\n\nzz\nxx": 400,
    JSON + "Content-Length: 100000\n\n" + "[" * 100_000: 400,
}


def test_garbage_is_refused_and_the_server_goes_on(live):
    for text, status in GARBAGE.items():
        with closing(socket.create_connection(("127.0.0.1", live.port))) as client:
            client.settimeout(5)
            client.sendall(text.replace("\n", "\r\n").encode("latin-1") + b"\r\n")
            assert client.recv(12) == f"HTTP/1.1 {status}".encode(), text[:60]
    until(lambda: is_free(live))
    assert httpx.get(f"{live.url}/ready").status_code == 200


def test_a_body_that_does_not_arrive_in_time_is_a_408(live, monkeypatch):
    monkeypatch.setattr("retnet.serve.http.access.guard.BODY_SECONDS", 0.1)
    monkeypatch.setattr("retnet.serve.http.access.exchange.LINGER_SECONDS", 0.05)
    with closing(socket.create_connection(("127.0.0.1", live.port))) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
        client.sendall(f"{head}\r\nContent-Length: 1000\r\n\r\n{{".encode())
        client.settimeout(5)
        answer = b""
        while part := client.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.1 s" in answer
    until(lambda: is_free(live))


def test_a_request_whose_time_is_over_ends_with_an_error_event():
    with live_server(Settings(max_new_tokens=ENDLESS, timeout=0.2), max_tokens=None) as live:
        with closing(connect(live, stream=True)) as client:
            client.settimeout(10)
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += client.recv(65536)
        assert b"the request took longer than 0.2 s" in answer
        assert b"[DONE]" not in answer
        until(lambda: is_free(live))


def test_requests_that_run_may_finish_while_the_server_drains():
    with live_server(Settings(max_new_tokens=ENDLESS, grace=30), max_tokens=None) as live:
        answers = []

        def ask() -> None:
            body = {"model": "tiny", "prompt": [1], "max_tokens": 300, "ignore_eos": True}
            answers.append(httpx.post(f"{live.url}/v1/completions", json=body, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: Status.DECODING in statuses(live))
        live.server.drain()
        assert httpx.get(f"{live.url}/ready").status_code == 503
        refused = httpx.post(f"{live.url}/v1/completions", json={"model": "tiny", "prompt": [1], "max_tokens": 1})
        assert refused.status_code == 503
        thread.join(30)
        until(lambda: live.server.should_exit)
    assert answers[0].json()["usage"]["completion_tokens"] == 300


def test_what_runs_after_the_grace_period_ends_with_an_error_event():
    with live_server(Settings(max_new_tokens=ENDLESS, grace=0.2), max_tokens=None) as live:
        with closing(connect(live, stream=True)) as client, closing(connect(live)) as other:
            until(lambda: statuses(live) == [Status.DECODING] * 2)
            live.server.drain()
            answers = []
            for each in (client, other):
                each.settimeout(10)
                answer = b""
                while part := each.recv(65536):
                    answer += part
                answers.append(answer)
        until(lambda: live.server.should_exit)
    streamed, whole = answers
    assert streamed.startswith(b"HTTP/1.1 200 ")
    assert b'data: {"error"' in streamed
    assert b"the server is shutting down" in streamed
    assert whole.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_exits_with_0(number):
    """In the main thread, as the command runs it."""
    settings = Settings(max_new_tokens=ENDLESS)
    app = create_app(tiny_service(settings))
    answers = []
    with closing(run.bound_socket("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"

        def ask() -> None:
            body = {"model": "tiny", "prompt": [1], "max_tokens": 100, "ignore_eos": True}
            answers.append(httpx.post(url, json=body, timeout=60))

        def act() -> None:
            asking = threading.Thread(target=ask)
            asking.start()
            until(lambda: app.state.service.num_streams)
            os.kill(os.getpid(), number)
            asking.join(30)

        acting = threading.Thread(target=act)
        before = signal.getsignal(number), sys.getswitchinterval()
        assert run.serve(app, settings, listener, acting.start) == 0
        acting.join(30)
        assert (signal.getsignal(number), sys.getswitchinterval()) == before
    assert answers[0].json()["usage"]["completion_tokens"] == 100


def test_the_end_of_the_engines_thread_ends_the_server_with_1(monkeypatch):
    settings = Settings(max_new_tokens=ENDLESS)
    service = tiny_service(settings)
    app = create_app(service)
    answers = []

    def die() -> None:
        raise SystemExit("the engine's thread was told to")

    def act() -> None:
        body = {"model": "tiny", "prompt": [1], "max_tokens": 10}
        monkeypatch.setattr(service.engine, "step", die)
        answers.append(httpx.post(url, json=body, timeout=60))

    with closing(run.bound_socket("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        acting = threading.Thread(target=act)
        assert run.serve(app, settings, listener, acting.start) == 1
        acting.join(30)
    assert answers[0].status_code == 500
    assert not service.alive


def test_a_taken_port_is_told_before_a_model_is_loaded():
    with closing(run.bound_socket("127.0.0.1", 0)) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=rf"in use \(127.0.0.1, port {port}\)"):
            run.bound_socket("127.0.0.1", port)


def test_a_session_that_is_cut_by_the_end_of_the_server_goes_on_in_the_next_as_if_nothing_had_happened(tmp_path):
    settings = Settings(max_new_tokens=ENDLESS, grace=0.2, state_dir=tmp_path)
    letters = {"temperature": 0, "logit_bias": {str(token): 100 for token in range(97, 123)}}  # no half characters
    with live_server(settings, max_tokens=None) as live:
        with closing(connect(live, keep_session=True, **letters)) as client:
            until(lambda: statuses(live) == [Status.DECODING])
            live.server.drain()
            client.settimeout(10)
            answer = b""
            while part := client.recv(65536):
                answer += part
        until(lambda: live.server.should_exit)
    cut = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert cut["choices"][0]["finish_reason"] == "length"
    begun = cut["usage"]["completion_tokens"]
    body = {"model": "tiny", "ignore_eos": True} | letters
    with live_server(settings, max_tokens=None) as live:

        def ask(**fields: object) -> dict:
            return httpx.post(f"{live.url}/v1/completions", json=body | fields, timeout=60).json()["choices"][0]

        more = ask(prompt="", session_id=cut["session"]["id"], max_tokens=5)
        whole = ask(prompt=[1, 2, 3], max_tokens=begun + 5)
    assert cut["choices"][0]["text"] + more["text"] == whole["text"]
