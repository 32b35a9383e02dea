"""The routes of sessions: list, look, fork, delete, download and upload."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load

from retnet.models.snapshot import Snapshot
from retnet.serve.http.sessions import routes as sessions
from retnet.serve.http.settings import Settings
from tests.serve.http.server import tiny_server

from .tools import snapshot_of

OCTETS = {"Content-Type": "application/octet-stream"}


@contextmanager
def server(settings: Settings | None = None, **options: Any):
    with tiny_server(settings, **options) as client:
        yield client


def kept(client, length: int = 9, key: str = "", seed: int = 0, **options: Any) -> str:
    """The id of a new session."""
    state = client.app.state
    snapshot = client.portal.call(state.service.call, lambda engine: snapshot_of(engine, length, seed))
    work = lambda: state.sessions.keep(None, snapshot, key=key, **options)  # noqa: E731
    return client.portal.call(work).id


def upload(client, data: bytes):
    return client.post("/v1/sessions", content=data, headers=OCTETS)


def test_a_session_says_what_it_is_and_where_it_lies(tmp_path):
    with server(Settings(state_dir=tmp_path)) as client:
        session_id = kept(client)
        client.portal.call(client.app.state.sessions.flush)
        found = client.get(f"/v1/sessions/{session_id}").json()
        assert found["id"] == session_id
        assert found["tokens"] == 10
        assert found["where"] == ["memory", "disk"]
        assert found["bytes"] > 1000
        assert found["expires"] - found["last_used"] == 24 * 3600
        assert (found["foreign"], found["parent"], found["usable"]) == (False, None, True)
        fork = client.post(f"/v1/sessions/{session_id}/fork")
        assert fork.status_code == 201
        assert fork.json()["parent"] == session_id
        assert [s["id"] for s in client.get("/v1/sessions").json()["data"]][-1] == session_id
        assert client.delete(f"/v1/sessions/{session_id}").json()["deleted"]
        assert client.get(f"/v1/sessions/{session_id}").json()["error"]["code"] == "session_not_found"
        assert client.delete(f"/v1/sessions/{session_id}").status_code == 404


def test_a_session_tells_its_messages_where_they_are_asked_for():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with server() as client:
        session_id, silent = kept(client, messages=messages), kept(client, seed=1)
        assert "messages" not in client.get(f"/v1/sessions/{session_id}").json()
        assert client.get(f"/v1/sessions/{session_id}?messages=true").json()["messages"] == messages
        assert client.get(f"/v1/sessions/{silent}?messages=true").json()["messages"] is None


def test_metrics_count_sessions_and_their_bytes():
    with server() as client:
        size = client.get(f"/v1/sessions/{kept(client)}").json()["bytes"]
        text = client.get("/metrics").text
        assert "retnet_sessions 1.0" in text
        assert f"retnet_session_memory_bytes {float(size)}" in text
        assert "retnet_session_disk_bytes 0.0" in text


def test_sessions_are_listed_in_pages():
    with server() as client:
        ids = {kept(client) for _ in range(3)}
        first = client.get("/v1/sessions?limit=2").json()
        rest = client.get(f"/v1/sessions?limit=2&after={first['last_id']}").json()
        assert (first["has_more"], rest["has_more"]) == (True, False)
        assert {s["id"] for s in first["data"] + rest["data"]} == ids
        for query in ("limit=0", "limit=101", "limit=x"):
            assert client.get(f"/v1/sessions?{query}").json()["error"]["param"] == "limit"
        assert client.get("/v1/sessions?after=nothing").json()["error"]["param"] == "after"


@pytest.mark.parametrize("stack", ["retention", "hybrid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_downloaded_session_is_uploaded_again_as_a_foreign_one(tmp_path, stack, dtype):
    messages = [{"role": "user", "content": "Grüße"}]
    with server(stack=stack) as client:
        session_id = kept(client, messages=messages)
        response = client.get(f"/v1/sessions/{session_id}/state?dtype={dtype}")
        assert response.headers["content-type"] == "application/octet-stream"
        assert int(response.headers["content-length"]) == len(response.content)
        (tmp_path / "file").write_bytes(response.content)
        store = client.app.state.sessions
        original = client.portal.call(store.open, session_id, "")
        found = Snapshot.load(tmp_path / "file")
        assert found.tokens == original.snapshot.tokens
        assert (found.rounding_error == 0) == (dtype == "float32")
        uploaded = upload(client, response.content)
        assert uploaded.status_code == 201, uploaded.text
        assert uploaded.json()["foreign"]
        assert uploaded.json()["tokens"] == 10
        again = client.portal.call(store.open, uploaded.json()["id"], "")
        assert again.messages == messages
        for a, b in zip(again.snapshot.state.named_tensors().values(), found.state.named_tensors().values()):
            assert torch.equal(a, b)
        assert client.post(f"/v1/sessions/{again.id}/fork").json()["foreign"]


def test_downloads_take_places_that_they_give_back(monkeypatch):
    monkeypatch.setattr(sessions, "MOST_DOWNLOADS", 1)
    with server() as client:
        path = f"/v1/sessions/{kept(client)}/state"
        for _ in range(3):
            assert client.get(path).status_code == 200
        assert client.app.state.downloads == 0
        client.app.state.downloads = 1
        refused = client.get(path)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")


def test_a_download_names_no_key_and_an_unknown_dtype_is_refused():
    with server() as client:
        session_id = kept(client)
        data = client.get(f"/v1/sessions/{session_id}/state").content
        owner = client.portal.call(client.app.state.sessions.open, session_id, "").record.owner
        assert owner.encode() not in data
        refused = client.get(f"/v1/sessions/{session_id}/state?dtype=float16")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "dtype"


@pytest.fixture(scope="module")
def client():
    with server(Settings(max_upload=300_000)) as client:
        yield client


@pytest.fixture(scope="module")
def whole(client) -> bytes:
    """A file that the server takes."""
    return client.get(f"/v1/sessions/{kept(client)}/state").content


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(head: Any, body: bytes) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + body


def refusal(client, data: bytes) -> dict[str, Any]:
    before = len(client.app.state.sessions)
    response = upload(client, data)
    assert 400 <= response.status_code < 500, response.text
    assert len(client.app.state.sessions) == before
    return response.json()["error"]


def test_uploads_of_another_content_type_are_refused(client, whole):
    response = client.post("/v1/sessions", content=whole, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 415)


def test_a_state_of_another_model_is_refused(client, whole):
    head, body = parts(whole)
    head["__metadata__"]["model"] = "0" * 64
    assert refusal(client, joined(head, body))["code"] == "session_of_another_model"


def test_every_truncation_of_an_upload_is_refused(client, whole):
    for size in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        assert "file" in refusal(client, whole[:size])["message"]
    assert "goes on after" in refusal(client, whole + b"\0")["message"]


def test_heads_that_lie_are_refused(client, whole):
    head, body = parts(whole)
    name = next(name for name in head if name.endswith(".memory"))
    huge = 2**62
    changes = [
        {name: head[name] | {"shape": [1, huge, huge, 4]}},
        {name: head[name] | {"shape": [1, 2, 3]}},
        {name: head[name] | {"dtype": "F64"}},
        {name: head[name] | {"dtype": ["F32"]}},
        {name: head[name] | {"data_offsets": [0, huge]}},
        {name: head[name] | {"data_offsets": [4, 2]}},
        {name: head[name] | {"data_offsets": [-4, 0]}},
        {name: head[name] | {"data_offsets": head["tokens"]["data_offsets"]}},
        {name: head[name] | {"more": 1}},
        {name: None},
        {"9.retention.memory": head[name]},
        {"tokens": head["tokens"] | {"shape": [huge]}},
        {"tokens": head["tokens"] | {"shape": [1, 10]}},
        {"__metadata__": []},
        {"__metadata__": head["__metadata__"] | {"dtypes": "[" * 100_000}},
        {"__metadata__": head["__metadata__"] | {"dtypes": "{}"}},
        {"__metadata__": head["__metadata__"] | {"position": "11"}},
        {"__metadata__": head["__metadata__"] | {"rounding_error": "nan"}},
        {"__metadata__": head["__metadata__"] | {"output_start": "1" * 9999}},
    ]
    for change in changes:
        refusal(client, joined(head | change, body))
    twice = json.dumps(head)[:-1] + f', "{name}": {json.dumps(head[name])}}}'
    for text in (b"", b"{", b"[]", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"\xff\xfe", twice.encode()):
        refusal(client, joined(text, body))
    refusal(client, (2**63).to_bytes(8, "little") + whole[8:])
    refusal(client, (2**20 + 1).to_bytes(8, "little") + b" " * (2**20 + 1))


def forged(whole: bytes, change) -> bytes:
    """The file with other tensors and a digest that matches them."""
    from retnet.models.snapshot_file import StoredTensors, digest, pieces

    tensors, metadata = load(whole), dict(parts(whole)[0]["__metadata__"])
    change(tensors, metadata)
    metadata.pop("content")
    metadata["tokens"] = digest({"tokens": tensors["tokens"]}, {})
    metadata["content"] = digest(tensors, metadata)
    return b"".join(bytes(piece) for piece in pieces(StoredTensors(tensors, torch.float32), metadata))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_states_that_are_not_finite_are_refused(client, whole, value):
    def spoil(tensors, _):
        tensors["1.retention.memory"].view(-1)[-1] = value

    assert "not finite" in refusal(client, forged(whole, spoil))["message"]


def test_tokens_outside_the_vocabulary_and_wrong_positions_are_refused(client, whole):
    assert upload(client, forged(whole, lambda *_: None)).status_code == 201

    def token(value):
        return lambda tensors, _: tensors["tokens"].__setitem__(3, value)

    assert "vocabulary" in refusal(client, forged(whole, token(257)))["message"]
    assert "token" in refusal(client, forged(whole, token(-1)))["message"]
    refusal(client, forged(whole, lambda tensors, _: tensors["0.retention.position"].add_(1)))
    refusal(client, forged(whole, lambda tensors, _: tensors["0.retention.position"].fill_(-1)))


@pytest.mark.parametrize(
    "messages",
    [
        b"{",
        b"[" * 100_000,
        b"{}",
        b"[1]",
        b'[{"content": "x"}]',
        b'[{"role": 1}]',
        b"\xff",
        b'[{"role": "user"}]',
        b'[{"role": "user", "content": {"a": 1}}]',
        b'[{"role": "user", "content": "x", "tool_calls": []}]',
        b'[{"role": "root", "content": "x"}]',
        b'[{"role": "user", "content": "x", "other": 1}]',
    ],
)
def test_messages_that_are_none_are_refused(client, whole, messages):
    def attach(tensors, _):
        tensors["attachment"] = torch.frombuffer(bytearray(messages), dtype=torch.uint8)

    assert "messages" in refusal(client, forged(whole, attach))["message"]


@pytest.mark.parametrize("change", ["longer", "shorter", "other dtype", "missing", "no window"])
def test_caches_of_a_wrong_size_are_refused(change):
    """Attention keeps its tokens up to its window; a state with fewer would have forgotten some."""
    with server(stack="hybrid") as client:
        whole = client.get(f"/v1/sessions/{kept(client)}/state").content
        assert upload(client, forged(whole, lambda *_: None)).status_code == 201
        name = next(name for name in parts(whole)[0] if name.endswith("attention.keys"))

        def spoil(tensors, _):
            x = tensors.pop(name)
            if change == "longer":
                tensors[name] = torch.cat([x, x], 1)
            elif change == "shorter":
                tensors[name] = x[:, 1:].contiguous()
            elif change == "no window":
                tensors[name] = x[:, :0].contiguous()
            elif change == "other dtype":
                tensors[name] = x.half()

        refusal(client, forged(whole, spoil))


def test_an_upload_in_small_parts_is_taken_and_one_that_stops_leaves_nothing(client, whole, tmp_path):
    def slowly(data):
        for start in range(0, len(data), 3000):
            yield data[start : start + 3000]

    assert client.post("/v1/sessions", content=slowly(whole), headers=OCTETS).status_code == 201
    with server(Settings(state_dir=tmp_path)) as other:
        assert upload(other, whole[:-1]).status_code == 400
        assert upload(other, whole).status_code == 201
        assert not list(tmp_path.glob(".upload*"))


def test_an_upload_over_the_limit_is_refused(client, whole):
    small = len(whole) // 2
    with server(Settings(max_upload=small)) as other:
        assert upload(other, whole).status_code == 413


def test_a_changed_byte_anywhere_never_fails_the_server(client, whole):
    import random

    rng, length = random.Random(0), int.from_bytes(whole[:8], "little")
    for i in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(8 + length) if i % 3 else rng.randrange(len(data))] = rng.randrange(256)
        if bytes(data) == whole:
            continue
        if upload(client, bytes(data)).status_code != 201:
            refusal(client, bytes(data))
            continue
        head = parts(bytes(data))[0]
        assert head == parts(whole)[0], "only a change that means nothing is taken"
