"""The guard: what every request passes before the application sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import Request
from starlette.testclient import TestClient

from retnet.serve.http.app import create_app
from retnet.serve.http.settings import Settings
from tests.serve.http.server import tiny_service

KEY = "alice-0123456789abcdef"


@pytest.fixture
def make(request):
    """A client of a server with these settings, and a route that returns what it was given."""

    def client(**settings) -> TestClient:
        app = create_app(tiny_service(Settings(**settings)))

        @app.post("/v1/echo")
        async def echo(request: Request) -> dict:
            body = await request.body()
            return {"body": body.decode(), "key": request.state.key, "id": request.state.request_id}

        @app.post("/v1/broken")
        async def broken() -> None:
            raise RuntimeError("a secret of a prompt")

        opened = TestClient(app, base_url="http://127.0.0.1:8000")
        request.addfinalizer(lambda: opened.__exit__(None, None, None))
        return opened.__enter__()

    return client


@pytest.fixture
def key_file(tmp_path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"alice:{KEY}\n")
    path.chmod(0o600)
    return path


def test_another_sites_name_and_another_sites_page_are_refused(make):
    client = make()
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
    assert client.post("/v1/echo", json={}, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post("/v1/echo", json={}, headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
    assert client.get("/health", headers={"origin": "http://evil.example"}).status_code == 200
    response = client.get("/health", headers={"origin": "http://127.0.0.1:8000"})
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize("given", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_types_that_browsers_post_across_sites_are_refused(make, given):
    response = make().post("/v1/echo", content="{}", headers={"content-type": given} if given else {})
    assert response.status_code == 415
    assert "accepted: application/json" in response.json()["error"]["message"]


def test_json_passes_whatever_its_parameters_and_so_does_no_body(make):
    client = make()
    response = client.post("/v1/echo", content="{}", headers={"content-type": "Application/JSON; charset=utf-8"})
    assert response.json()["body"] == "{}"
    assert client.post("/v1/echo").json()["body"] == ""


def test_a_body_beyond_the_limit_is_refused_by_its_length_and_by_its_bytes(make):
    client = make(max_body=1000)
    headers = {"content-type": "application/json"}
    assert client.post("/v1/echo", content=b"x" * 1000, headers=headers).status_code == 200
    assert client.post("/v1/echo", content=b"x" * 1001, headers=headers).status_code == 413
    chunked = client.post("/v1/echo", content=iter([b"x" * 600] * 2), headers=headers)
    assert chunked.status_code == 413
    assert chunked.json()["error"]["message"] == "the body is larger than 1,000 bytes, which this server accepts"


def test_a_key_is_needed_for_the_api_and_for_metrics_but_not_for_probes_and_the_page(make, key_file):
    client = make(api_key_file=key_file)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/none", "/other"):
        response = client.get(path)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), path
    for path in ("/health", "/ready", "/version"):
        assert client.get(path).status_code == 200
    assert client.get("/").status_code in (200, 404)
    assert client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": f"bearer  {KEY} "}).status_code == 200
    for wrong in (f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer", "Bearer alice", f"Bearer alice:{KEY}"):
        response = client.get("/v1/models", headers={"authorization": wrong})
        assert response.status_code == 401
        assert KEY not in response.text


def test_handlers_get_the_id_of_the_key_and_never_the_key(make, key_file):
    client = make(api_key_file=key_file)
    assert client.post("/v1/echo", json={}, headers={"authorization": f"Bearer {KEY}"}).json()["key"] == "alice"
    assert make().post("/v1/echo", json={}).json()["key"] == ""


def test_a_clients_request_id_identifies_nothing(make):
    client = make()
    answers = [client.post("/v1/echo", json={}, headers={"x-request-id": "mine"}) for _ in range(2)]
    ids = [answer.json()["id"] for answer in answers]
    assert len({*ids, "mine"}) == 3
    assert [answer.headers["x-request-id"] for answer in answers] == ids


def test_a_caller_beyond_its_rate_gets_429_with_retry_after(make):
    client = make(rate=6)
    assert client.post("/v1/echo", json={}).status_code == 200
    response = client.post("/v1/echo", json={})
    assert (response.status_code, response.headers["retry-after"]) == (429, "10")
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert client.get("/v1/models").status_code == 200


def test_every_response_has_the_security_headers(make):
    client = make()
    for response in (client.get("/health"), client.get("/none"), client.post("/v1/echo", content="x")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert "server" not in response.headers


def test_an_unknown_path_and_a_wrong_method_are_told_in_the_form_of_the_api(make):
    client = make()
    assert client.get("/v1/none").json()["error"]["type"] == "not_found_error"
    response = client.delete("/v1/echo")
    assert (response.status_code, response.headers["allow"]) == (405, "POST, OPTIONS")
    assert response.json()["error"]["message"] == "DELETE is not a method of this path; accepted: POST"


def test_head_is_get_without_its_body_and_options_lists_the_methods(make):
    client = make()
    got, head = client.get("/version"), client.head("/version")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]
    options = client.options("/version")
    assert (options.status_code, options.headers["allow"]) == (204, "GET, OPTIONS, HEAD")
    assert client.head("/v1/echo").status_code == 405


def test_an_unexpected_error_is_a_500_that_says_nothing_of_it(make):
    response = make().post("/v1/broken", json={})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


def test_a_request_that_takes_too_long_ends(make):
    client = make(timeout=0.05)

    @client.app.get("/v1/slow")
    async def slow() -> None:
        import asyncio

        await asyncio.sleep(30)

    response = client.get("/v1/slow")
    assert response.status_code == 504
    assert response.json()["error"]["message"] == "the request took longer than 0.05 s, the limit of this server"


def test_a_draining_server_takes_no_more_requests(make):
    client = make()
    client.app.state.service.draining = True
    response = client.post("/v1/echo", json={})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
