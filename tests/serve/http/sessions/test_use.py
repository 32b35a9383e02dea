"""Requests that continue sessions and keep them: the same tokens as without, what was reused, and what is refused."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from retnet.serve.http.settings import Settings
from tests.serve.http.server import live_server, tiny_server

GREEDY = {"temperature": 0, "max_tokens": 8, "logprobs": 1}


@pytest.fixture(scope="module")
def client():
    with tiny_server(prefix_cache_bytes=2**24) as client:
        yield client


def complete(client, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": prompt, **GREEDY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refused(client, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": prompt, **GREEDY, **fields})
    assert 400 <= response.status_code < 500, response.text
    return response.json()["error"]


def text_of(body: dict[str, Any]) -> str:
    return body["choices"][0]["text"]


def test_a_kept_session_takes_only_the_new_text(client):
    first = complete(client, "Once upon", keep_session=True)
    session = first["session"]
    assert session == {
        "id": session["id"],
        "tokens": 1 + 9 + 8,
        "reused_tokens": 0,
        "not_reused": None,
        "not_kept": None,
    }
    second = complete(client, " a time", session_id=session["id"], keep_session=True)
    assert second["session"]["id"] == session["id"]
    assert second["session"]["tokens"] == 18 + 7 + 8
    assert second["session"]["reused_tokens"] == 17
    assert second["usage"]["prompt_tokens"] == 18 + 7
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 17
    ids = [256, *b"Once upon"]
    again = complete(client, ids, ignore_eos=True)
    whole = complete(client, [*ids, *tokens_of(client, session["id"])[10:25]], ignore_eos=True)
    assert text_of(again) == text_of(first)
    assert text_of(whole) == text_of(second)


def tokens_of(client, session_id: str) -> list[int]:
    store = client.app.state.sessions
    return client.portal.call(store.open, session_id, "").snapshot.tokens.tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 11, "frequency_penalty": 0.7}])
@pytest.mark.parametrize("stack", ["retention", "hybrid"])
def test_continued_without_new_text_a_session_is_one_uninterrupted_generation(stack, sampling):
    """Bit-identical, as docs/do/engine.md promises: compared by log-probabilities."""
    with tiny_server(stack=stack) as client:
        whole = complete(client, "A prompt", **sampling, max_tokens=24)["choices"][0]["logprobs"]
        first = complete(client, "A prompt", **sampling, max_tokens=9, keep_session=True)
        parts = [first["choices"][0]["logprobs"]]
        for count in (1, 14):
            fields = {"session_id": first["session"]["id"], "keep_session": True, "max_tokens": count}
            parts.append(complete(client, "", **sampling, **fields)["choices"][0]["logprobs"])
        for name in ("token_logprobs", "tokens"):
            assert [x for part in parts for x in part[name]] == whole[name]


def test_a_session_is_not_changed_by_a_request_that_does_not_keep_it(client):
    session_id = complete(client, "abc", keep_session=True)["session"]["id"]
    answers = [complete(client, " def", session_id=session_id) for _ in range(2)]
    assert text_of(answers[0]) == text_of(answers[1])
    assert [answer["session"]["tokens"] for answer in answers] == [12, 12]
    assert client.get(f"/v1/sessions/{session_id}").json()["revision"] == 1


def test_a_stream_says_its_session_in_the_chunk_that_ends_it(client):
    with client.stream(
        "POST", "/v1/completions", json={"prompt": "x", **GREEDY, "stream": True, "keep_session": True}
    ) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert [chunk.get("session") for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    session = chunks[-1]["session"]
    assert session["tokens"] == 10
    assert text_of(complete(client, "", session_id=session["id"]))


def test_a_token_that_ended_the_output_gives_way_to_new_text(client):
    """So a session holds the text that the client saw. Without new text it goes on after that token."""
    ids = [256, *b"hello"]
    free = complete(client, ids, max_tokens=6)
    store = client.app.state.sessions
    session_id = complete(client, ids, max_tokens=6, keep_session=True)["session"]["id"]
    end = tokens_of(client, session_id)[8]
    first = complete(client, ids, max_tokens=6, keep_session=True, stop_token_ids=[end])
    assert first["choices"][0]["finish_reason"] == "stop"
    kept = tokens_of(client, first["session"]["id"])
    assert kept[-1] == end
    assert client.portal.call(store.open, first["session"]["id"], "").record.ended
    second = complete(client, [7, 8, 9], session_id=first["session"]["id"], ignore_eos=True, echo=True)
    plain = complete(client, [*kept[:-1], 7, 8, 9], ignore_eos=True)
    logprobs = second["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][3:] == pytest.approx(plain["choices"][0]["logprobs"]["token_logprobs"], abs=1e-4)
    assert logprobs["token_logprobs"][0] is None
    assert second["usage"]["prompt_tokens"] == len(kept) - 1 + 3
    assert complete(client, "", session_id=first["session"]["id"])["usage"]["prompt_tokens"] == len(kept)
    file = client.get(f"/v1/sessions/{first['session']['id']}/state").content
    octets = {"content-type": "application/octet-stream"}
    moved = client.post("/v1/sessions", content=file, headers=octets).json()["id"]
    again = complete(client, [7, 8, 9], session_id=moved, ignore_eos=True, echo=True)
    assert again["usage"]["prompt_tokens"] == len(kept) - 1 + 3
    assert text_of(free)


def test_the_text_of_a_stop_string_is_in_the_session(client):
    """The state has read it. Only a token that has not been read can give way."""
    ids = [256, *b"hello"]
    free = complete(client, ids, keep_session=True)
    tokens = tokens_of(client, free["session"]["id"])[6:]
    text = bytes(token for token in tokens if token < 256).decode("latin-1")
    at = next(i for i in range(1, 7) if text[i].isascii() and text[i] not in text[:i])
    stopped = complete(client, ids, keep_session=True, stop=[text[at]])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert tokens_of(client, stopped["session"]["id"])[6:] == tokens[: at + 1]
    assert not client.portal.call(client.app.state.sessions.open, stopped["session"]["id"], "").record.ended


def test_prompt_ids_and_several_choices_continue_one_session(client):
    session_id = complete(client, "abc", keep_session=True)["session"]["id"]
    one = text_of(complete(client, " d", session_id=session_id))
    many = complete(client, " d", session_id=session_id, n=2)
    assert [choice["text"] for choice in many["choices"]] == [one] * 2
    assert text_of(complete(client, list(b" d"), session_id=session_id)) == one
    assert refused(client, [" d", " e"], session_id=session_id)["param"] == "prompt"


@pytest.mark.parametrize("fields", [{"n": 2}, {"prompt": ["a", "b"]}])
def test_several_outputs_cannot_be_kept_in_one_session(client, fields):
    error = refused(client, fields.pop("prompt", "a"), keep_session=True, **fields)
    assert error["param"] == "keep_session"
    assert "2 outputs" in error["message"]


@pytest.mark.parametrize("session_id", ["", "x", "sess_" + 40 * "0", "../../etc/passwd"])
def test_an_unknown_session_is_a_404(client, session_id):
    response = client.post("/v1/completions", json={"prompt": "a", "session_id": session_id})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "session_not_found"
    assert response.json()["error"]["param"] == "session_id"


def test_the_context_counts_the_tokens_of_the_session():
    with tiny_server(max_tokens=40) as client:
        session_id = complete(client, "x" * 19, keep_session=True, max_tokens=10)["session"]["id"]
        assert complete(client, "", session_id=session_id, max_tokens=10)["usage"]["prompt_tokens"] == 30
        for fields in ({"prompt": "", "max_tokens": 11}, {"prompt": "yyy", "max_tokens": 8}, {"prompt": "y" * 11}):
            error = refused(client, session_id=session_id, **fields)
            assert error["code"] == "context_length_exceeded"
            assert "40" in error["message"]
        before = client.get(f"/v1/sessions/{session_id}").json()
        assert (before["tokens"], before["revision"]) == (30, 1)


def test_a_foreign_session_and_its_descendants_leave_the_prefix_cache_alone(client):
    text = "a text of more than sixty-four bytes, so that its beginning is worth a place in the cache"
    original = complete(client, text, keep_session=True)["session"]["id"]
    data = client.get(f"/v1/sessions/{original}/state").content
    headers = {"Content-Type": "application/octet-stream"}
    foreign = client.post("/v1/sessions", content=data, headers=headers).json()["id"]
    counts = lambda: client.portal.call(client.app.state.service.call, lambda e: e.stats().prefix)  # noqa: E731
    before = counts()
    for _ in range(2):
        answer = complete(client, " and more of it" * 5, session_id=foreign, keep_session=True)
        assert answer["session"]["id"] == foreign
        fork = client.post(f"/v1/sessions/{foreign}/fork").json()["id"]
        complete(client, " and more of it" * 5, session_id=fork, keep_session=True)
    after = counts()
    assert (after.stored, after.hits, after.tokens_saved) == (before.stored, before.hits, before.tokens_saved)
    complete(client, " and more of it" * 5, session_id=original, keep_session=True)
    assert counts().stored > before.stored, "the same request of a session of our own does feed it"


def test_a_deleted_session_is_not_kept_by_a_request_that_runs(client):
    session_id = complete(client, "abc", keep_session=True)["session"]["id"]
    body = {"prompt": "d", "session_id": session_id, "keep_session": True, "max_tokens": 300, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/v1/completions", json=body)
        while not client.app.state.service.engine.stats().running:
            time.sleep(0.001)
        assert client.delete(f"/v1/sessions/{session_id}").status_code == 200
        answer = running.result().json()
    assert answer["usage"]["completion_tokens"] == 300
    assert answer["session"]["id"] is None
    assert "there is no session" in answer["session"]["not_kept"]


def test_two_requests_on_one_session_start_from_the_same_state_and_both_are_kept(client):
    session_id = complete(client, "abc", keep_session=True)["session"]["id"]
    alone = text_of(complete(client, " go", session_id=session_id, max_tokens=100))
    body = {"prompt": " go", "session_id": session_id, "keep_session": True, **GREEDY, "max_tokens": 100}
    with ThreadPoolExecutor(2) as pool:
        answers = [
            job.result().json() for job in [pool.submit(client.post, "/v1/completions", json=body) for _ in (1, 2)]
        ]
    assert [text_of(answer) for answer in answers] == [alone] * 2
    ids = {answer["session"]["id"] for answer in answers}
    assert session_id in ids
    assert len(ids) == 2
    other = (ids - {session_id}).pop()
    assert client.get(f"/v1/sessions/{other}").json()["parent"] == session_id


def test_a_request_that_is_broken_off_changes_no_session():
    import httpx

    with live_server() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        session_id = complete(client, "abc", keep_session=True)["session"]["id"]
        before = client.get(f"/v1/sessions/{session_id}").json()
        body = {"prompt": "d", "session_id": session_id, "keep_session": True, "max_tokens": 480, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            next(response.iter_lines())
        deadline = time.monotonic() + 10
        while server.service.engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        after = client.get(f"/v1/sessions/{session_id}").json()
        assert (after["revision"], after["tokens"]) == (before["revision"], before["tokens"])
        assert len(client.get("/v1/sessions").json()["data"]) == 1


def test_sessions_survive_a_restart_of_the_server(tmp_path):
    settings = Settings(state_dir=tmp_path)
    with tiny_server(settings, stack="hybrid") as client:
        whole = complete(client, "The river", max_tokens=20)["choices"][0]["logprobs"]
        first = complete(client, "The river", max_tokens=12, keep_session=True)
    with tiny_server(settings, stack="hybrid") as client:
        session_id = first["session"]["id"]
        assert client.get(f"/v1/sessions/{session_id}").json()["where"] == ["disk"]
        rest = complete(client, "", session_id=session_id)
        assert rest["choices"][0]["logprobs"]["token_logprobs"] == whole["token_logprobs"][12:]
        assert client.get(f"/v1/sessions/{session_id}").json()["where"] == ["memory", "disk"]


def test_sessions_of_one_key_are_not_found_by_another(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("zoe:0123456789abcdef0\nyan:0123456789abcdef1\n")
    keys.chmod(0o600)
    zoe, yan = ({"Authorization": f"Bearer 0123456789abcdef{i}"} for i in (0, 1))
    with tiny_server(Settings(api_key_file=keys, state_dir=tmp_path / "state")) as client:
        body = {"prompt": "a", **GREEDY, "keep_session": True}
        session_id = client.post("/v1/completions", json=body, headers=zoe).json()["session"]["id"]
        for method, path in (
            ("GET", ""), ("DELETE", ""), ("POST", "/fork"), ("GET", "/state")
        ):  # fmt: skip
            response = client.request(method, f"/v1/sessions/{session_id}{path}", headers=yan)
            missing = client.request(method, f"/v1/sessions/sess_{40 * '0'}{path}", headers=yan)
            assert response.status_code == missing.status_code == 404
            assert response.text.replace(session_id, f"sess_{40 * '0'}") == missing.text
        more = {"prompt": "b", "session_id": session_id}
        assert client.post("/v1/completions", json=more, headers=yan).status_code == 404
        assert client.get("/v1/sessions", headers=yan).json()["data"] == []
        assert client.post("/v1/completions", json=more, headers=zoe).status_code == 200
        assert client.get(f"/v1/sessions/{session_id}").status_code == 401


def test_a_state_that_cannot_be_kept_is_said_and_the_answer_is_whole():
    with tiny_server(Settings(session_memory=100)) as client:
        answer = complete(client, "abc", keep_session=True)
        assert answer["session"]["id"] is None
        assert "sessions may take" in answer["session"]["not_kept"]
        assert answer["usage"]["completion_tokens"] == 8


def test_a_session_of_another_server_s_model_is_named(tmp_path):
    with tiny_server(Settings(state_dir=tmp_path)) as client:
        session_id = complete(client, "abc", keep_session=True)["session"]["id"]
    with tiny_server(Settings(state_dir=tmp_path), stack="gated") as client:
        assert not client.get(f"/v1/sessions/{session_id}").json()["usable"]
        assert refused(client, "d", session_id=session_id)["code"] == "session_of_another_model"
        assert client.get(f"/v1/sessions/{session_id}/state").status_code == 409


@pytest.fixture(scope="module")
def tuned():
    """A server with two learned initial states beside the model."""
    from tests.models.test_initial_state import start_of

    with tiny_server(prefix_cache_bytes=2**24) as client:
        service = client.app.state.service
        model = service.engine.model
        service.states = {name: start_of(model, seed=seed) for seed, name in enumerate(("austen", "hardy"))}
        yield client


def test_a_request_starts_from_the_state_that_its_model_names(tuned):
    from retnet.models.decode.sampling import Sampling
    from retnet.serve.engine import Engine
    from retnet.serve.request import Request

    service, prompt = tuned.app.state.service, "It is a truth universally acknowledged, that"
    found = {name: complete(tuned, prompt, model=name) for name in ("tiny", "austen", "hardy", "austen")}
    assert {name: body["model"] for name, body in found.items()} == {name: name for name in found}
    assert {body["usage"]["prompt_tokens"] for body in found.values()} == {1 + len(prompt)}  # no token more
    engine = Engine(service.engine.model, num_slots=4, max_tokens=512)
    for name, body in found.items():
        ids = [256, *prompt.encode()]
        start = service.states.get(name)
        after, rest = (None, ids) if start is None else start.begin_of(ids)
        generation = engine.submit(Request(rest, 8, Sampling(temperature=0)), after)
        engine.run()
        assert text_of(body) == service.tokenizer.decode(generation.tokens)
    assert len({str(body["choices"][0]["logprobs"]) for body in found.values()}) == 3
    cached = [found[name]["usage"]["prompt_tokens_details"]["cached_tokens"] for name in ("tiny", "austen")]
    assert cached == [0, len(prompt)]  # the second request of a name finds the first one's prefix
    assert [model["id"] for model in tuned.get("/v1/models").json()["data"]] == ["tiny", "austen", "hardy"]
    assert tuned.get("/v1/models/hardy").json()["parent"] == "tiny"
    assert refused(tuned, "x", model="eliot")["message"] == (
        "there is no model 'eliot'; accepted: 'tiny', 'austen', 'hardy'"
    )


def test_echo_and_logprobs_after_a_state_are_those_of_the_whole_prompt(tuned):
    body = complete(tuned, ["ab", "cd"], model="austen", echo=True, max_tokens=1)
    alone = [complete(tuned, text, model="austen", echo=True, max_tokens=1) for text in ("ab", "cd")]
    plain = complete(tuned, "ab", echo=True, max_tokens=1)
    assert [choice["logprobs"] for choice in body["choices"]] == [one["choices"][0]["logprobs"] for one in alone]
    found = body["choices"][0]["logprobs"]
    assert found["tokens"][:2] == ["a", "b"]
    assert found["token_logprobs"][:2] != plain["choices"][0]["logprobs"]["token_logprobs"][:2]
    ids = complete(tuned, [[97, 98], [256, 97]], model="austen")  # each first token is read after the state
    parts = [complete(tuned, tokens, model="austen") for tokens in ([97, 98], [256, 97])]
    assert [choice["text"] for choice in ids["choices"]] == [text_of(part) for part in parts]


def test_a_session_keeps_the_state_that_it_began_from(tuned):
    first = complete(tuned, "Once upon", model="austen", keep_session=True, ignore_eos=True)
    session = first["session"]["id"]
    options = {"ignore_eos": True, "max_tokens": 4}
    texts = {
        text_of(complete(tuned, " a time", session_id=session, **options, **named))
        for named in ({}, {"model": "austen"}, {"model": "tiny"})
    }
    assert len(texts) == 1
    whole = [256, *b"Once upon", *tokens_of(tuned, session)[10:], *b" a time"]
    assert text_of(complete(tuned, whole, model="austen", **options)) in texts
    error = refused(tuned, " a time", session_id=session, model="hardy")
    assert error["code"] == "session_of_another_state"


def test_a_chat_starts_from_the_state_of_its_model(tuned):
    def answer(**fields: Any) -> str:
        messages = [{"role": "user", "content": "Hello"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 8, **fields}
        response = tuned.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == fields.get("model", "tiny")
        return response.json()["choices"][0]["message"]["content"]

    assert len({answer(), answer(model="austen"), answer(model="hardy")}) == 3
