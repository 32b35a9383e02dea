"""Health, readiness, version and the list of models."""

from __future__ import annotations

import time

from retnet import __version__
from retnet.serve.http.settings import Settings
from tests.serve.http.server import tiny_server


def test_a_server_that_runs_is_alive_and_ready():
    with tiny_server() as client:
        assert (client.get("/health").status_code, client.get("/health").json()) == (200, {"status": "ok"})
        assert (client.get("/ready").status_code, client.get("/ready").json()) == (200, {"status": "ready"})
        assert client.get("/version").json() == {"version": __version__}


def test_a_server_is_not_ready_while_it_drains_or_a_step_hangs_but_alive():
    with tiny_server() as client:
        service = client.app.state.service
        service._busy_since = time.perf_counter() - 100
        assert client.get("/ready").json()["reason"] == "the engine's step takes 100 s already"
        service._busy_since = None
        service.draining = True
        response = client.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "the server is shutting down")
        assert client.get("/health").status_code == 200


def test_a_server_whose_engine_ended_is_neither(monkeypatch):
    def die() -> None:
        raise SystemExit

    with tiny_server() as client:
        monkeypatch.setattr(client.app.state.service.engine, "step", die)
        body = {"model": "tiny", "prompt": [1], "max_tokens": 5}
        assert client.post("/v1/completions", json=body).status_code == 500
        assert client.get("/health").json() == {"status": "failed", "reason": "the engine ended: SystemExit"}
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json=body).status_code == 503


def test_the_model_is_listed_and_found_by_its_name():
    with tiny_server(Settings(), max_tokens=300) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 300)
        assert client.get("/v1/models/tiny").json() == model
        wrong = client.get("/v1/models/other/name")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
