"""Bodies of too many parts: pydantic would spend seconds on their errors."""

from __future__ import annotations

import json

import pytest

from retnet.serve.http.api.json_body import MAX_KEYS, num_keys

MANY = dict.fromkeys(map(str, range(MAX_KEYS)), "x")


@pytest.mark.parametrize("fields", [{"logit_bias": MANY}, {"prompt": [[1, {"a": [MANY]}]]}, MANY])
def test_the_keys_of_a_body_are_bounded(client, fields):
    response = client.post("/v1/completions", json={"prompt": "a", "user": "u"} | fields)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith("the body has 5000")
    assert "accepted: 50000" in message


def test_long_bodies_of_few_keys_are_taken(client):
    response = client.post("/v1/completions", json={"prompt": [[97] * 100] * 4, "user": "u", "max_tokens": 1})
    assert response.status_code == 200
    error = client.post("/v1/completions", json={"prompt": "a", "logit_bias": {"k" * 300_000: "x"}}).json()["error"]
    assert error["param"].startswith("logit_bias.kkk")
    assert len(json.dumps(error)) < 1000


def test_keys_are_counted_wherever_they_are():
    assert num_keys({"a": [1, {"b": {}, "c": [[{"d": 1}]]}]}) == 4
    assert num_keys([1, 2, "a", None]) == 0
    assert num_keys({}) == 0


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ('{"prompt": "a", "max_tokens": 1, "max_tokens": 2}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": 1, "max\\u005ftokens": 2}', "max_tokens"),  # the same key
        ('{"prompt": "a", "logit_bias": {"97": 1, "97": -1}}', "97"),
        ('{"prompt": [{"a": [{"b": 1, "b": 1}]}]}', "b"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(client, body, key):
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith(f"'{key}' is given twice in one object; accepted: once")


def test_equal_keys_of_different_objects_are_taken(client):
    body = '{"prompt": "a", "max_tokens": 1, "stream_options": null, "logit_bias": {"98": 1}, "user": "98"}'
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
