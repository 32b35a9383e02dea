"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Literal

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.testclient import TestClient

from retnet.serve.http.errors import ApiError, add_error_handlers


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int = Field(ge=0)
    kind: Literal["a", "b"] = "a"
    parts: list[dict[str, int]] = []


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    add_error_handlers(app)

    @app.post("/take")
    async def take(body: Body) -> Body:
        return body

    @app.get("/refuse")
    async def refuse() -> None:
        raise ApiError(429, "too many", code="busy", param="n", headers={"Retry-After": "3"})

    return TestClient(app)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"count": "x"}, "count", "count is 'x'"),
        ({"count": -1}, "count", "greater than or equal to 0"),
        ({}, "count", "count is missing"),
        ({"count": 1, "best_of": 2}, "best_of", "best_of is not a field that this server honours"),
        ({"count": 1, "kind": "c"}, "kind", "'a' or 'b'"),
        ({"count": 1, "parts": [{"x": "y"}]}, "parts.0.x", "parts.0.x is 'y'"),
        ([], None, "the body is"),
    ],
)
def test_a_malformed_field_is_a_400_that_names_it(client, body, param, message):
    response = client.post("/take", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert message in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", None)


@pytest.mark.parametrize("text", ["", "{", "[1,", "nope", '{"count": 1} x'])
def test_a_body_that_is_not_json_is_a_400(client, text):
    response = client.post("/take", content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "body" in response.json()["error"]["message"]


def test_a_huge_wrong_value_is_not_sent_back(client):
    response = client.post("/take", json={"count": "x" * 100_000})
    assert len(response.content) < 1000


def test_an_api_error_has_openais_fields_and_its_headers(client):
    response = client.get("/refuse")
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json() == {
        "error": {"message": "too many", "type": "rate_limit_error", "param": "n", "code": "busy"}
    }
