from __future__ import annotations

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from retnet.cli.chat_server import Kept, ServerBackend
from retnet.cli.chat_turn import ChatError, Turn
from retnet.serve.http.settings import Settings
from tests.serve.http.server import live_server

FIELDS = {"seed": 1, "max_tokens": 8, "logit_bias": {str(letter): 60 for letter in b"abcdefgh"}}


@pytest.fixture(scope="module")
def server():
    with live_server(prefix_cache_bytes=2**20) as server:
        yield server


@pytest.fixture
def backend(server):
    backend = ServerBackend(server.url, None, FIELDS)
    yield backend
    backend.close()


def say(backend, turn, text):
    answer = backend.ask(turn, text)
    return "".join(answer), answer


def sessions(backend) -> list:
    return backend.json("GET", "/v1/sessions")["data"]


def test_a_conversation_is_a_session_that_reads_only_what_is_new(backend):
    first, one = say(backend, Turn(), "Hello")
    second, two = say(backend, one.turn, "More")
    assert isinstance(one.turn.state, Kept)
    assert two.turn.state.id == one.turn.state.id
    assert two.figures.reused >= one.turn.tokens - 1
    assert two.figures.new_tokens == 8
    assert [message["content"] for message in two.turn.messages] == ["Hello", first, "More", second]
    assert say(backend, Turn(two.turn.messages[:2]), "More")[0] == second
    assert any("session sess_" in line for line in backend.facts(two.turn))


def test_a_fork_leaves_the_original_where_it_is(backend):
    _, one = say(backend, Turn(), "Hello")
    fork = backend.fork(one.turn)
    assert fork.state.id != one.turn.state.id
    left = say(backend, one.turn, "left")[0]
    say(backend, fork, "right")
    assert say(backend, Turn(one.turn.messages), "left")[0] == left


def test_a_stopped_answer_is_sent_again_with_the_next_message(server):
    backend = ServerBackend(server.url, None, FIELDS)
    _, one = say(backend, Turn(), "Hello")
    backend.fields["max_tokens"] = 300
    answer = backend.ask(one.turn, "long")
    pieces = []
    for piece in answer:
        pieces.append(piece)
        if len(pieces) == 3:
            answer.stop()
    assert answer.turn.messages[-1]["content"] == "".join(pieces)
    assert answer.turn.state == one.turn.state
    backend.fields["max_tokens"] = 4
    _, more = say(backend, answer.turn, "More")
    assert more.figures.not_reused is None
    assert more.figures.reused >= one.turn.tokens - 1
    assert [m["content"] for m in more.turn.messages[:4]] == [m["content"] for m in answer.turn.messages]
    backend.close()


def test_a_conversation_is_saved_and_loaded(backend, tmp_path):
    _, one = say(backend, Turn(), "Hello")
    file = tmp_path / "talk.safetensors"
    with pytest.raises(ChatError, match="say something first"):
        backend.save(Turn(), file)
    backend.save(one.turn, file)
    loaded = backend.load(file)
    assert loaded.messages == one.turn.messages
    text, again = say(backend, loaded, "More")
    assert again.figures.reused == one.turn.tokens - 1
    assert text == say(backend, one.turn, "More")[0]
    file.write_bytes(b"no")
    with pytest.raises(ChatError):
        backend.load(file)


def test_a_session_that_is_gone_is_read_again(backend):
    first, one = say(backend, Turn(), "Hello")
    backend.json("DELETE", f"/v1/sessions/{one.turn.state.id}")
    _, two = say(backend, one.turn, "More")
    assert "no such session" in two.figures.not_reused
    assert two.turn.messages[1]["content"] == first


def test_leaving_deletes_the_sessions(server):
    backend = ServerBackend(server.url + "/v1/", None, FIELDS)
    before = len(sessions(backend))
    _, one = say(backend, Turn(), "Hello")
    backend.fork(one.turn)
    assert len(sessions(backend)) == before + 2
    backend.close()
    assert len(sessions(backend)) == before


def test_what_the_server_refuses_is_told_in_its_words(server):
    backend = ServerBackend(server.url, None, {"temperature": -1})
    with pytest.raises(ChatError, match="temperature"):
        list(backend.ask(Turn(), "Hello"))


def test_a_key_is_sent_and_a_wrong_one_refused(tmp_path):
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text("me:a-secret-of-32-characters-0123456\n")
    with live_server(Settings(api_key_file=keys)) as server:
        assert ServerBackend(server.url, "a-secret-of-32-characters-0123456", FIELDS).model == "tiny"
        with pytest.raises(ChatError, match="key"):
            ServerBackend(server.url, "wrong", FIELDS)


@contextmanager
def fake(status: int, body: bytes, **headers: str):
    """A server that gives one response to everything, and notes what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, dict(self.headers)))
            code, data = (200, b'{"data": [{"id": "fake"}]}') if self.path == "/v1/models" else (status, body)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_):
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


CHUNK = b'data: {"choices": [{"index": 0, "delta": {"content": "ab"}, "finish_reason": null}]}\n\n'
ERROR = json.dumps({"error": {"message": "it broke"}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, CHUNK, "the stream ended before"),
        (200, CHUNK + b"data: " + ERROR + b"\n\n", "it broke"),
        (500, ERROR, "it broke"),
        (502, b"<html>", "the server answers 502"),
        (200, b"data: {nonsense\n\n", "the server sent"),
        (302, b"", "the server answers 302"),
    ],
)
def test_servers_that_fail_are_errors_of_the_turn(status, body, message):
    with fake(status, body, Location="http://127.0.0.1:1/") as (url, asked):
        backend = ServerBackend(url, "secret", FIELDS)
        with pytest.raises(ChatError, match=message):
            list(backend.ask(Turn(), "Hello"))
        assert [path for path, _ in asked] == ["/v1/models", "/v1/chat/completions"]
        assert asked[-1][1]["Authorization"] == "Bearer secret"


def test_a_place_without_a_server_is_named():
    with pytest.raises(ChatError, match=r"no answer from http://127.0.0.1:1: .*refused"):
        ServerBackend("http://127.0.0.1:1", None, FIELDS)
