"""Constrained requests to /v1/completions: what they may answer, and what they cannot do to their neighbours."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from retnet.serve.http.app import create_app
from retnet.serve.speculation import Speculation
from tests.serve.http.server import tiny_server, tiny_service

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
WHITE_SPACE = {str(byte): 60 for byte in b" \t\r\n"}  # a bias for it


@pytest.fixture(
    scope="module", params=[pytest.param(None, id="plain"), pytest.param(3, id="speculation", marks=pytest.mark.slow)]
)
def client(request):
    options = {} if request.param is None else {"speculation": Speculation(request.param)}
    with tiny_server(**options) as client:
        yield client


@pytest.fixture(scope="module")
def plain():
    with tiny_server() as client:
        yield client


def post(client: TestClient, **fields):
    return client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 300, **fields})


def choice(client: TestClient, **fields) -> dict:
    response = post(client, **fields)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice


def check_schema(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["name", "size", "tags"]
    assert len(value["name"]) <= 8
    assert 0 <= value["size"] <= 999
    assert len(value["tags"]) <= 2
    assert set(value["tags"]) <= {"red", "green"}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 1}, {"temperature": 3, "seed": 2}])
def test_answers_are_of_their_schema(client, sampling):
    described = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    for fields in ({"response_format": described}, {"structured_outputs": {"json": SCHEMA}}):
        answer = choice(client, **fields, **sampling)
        assert answer["finish_reason"] == "stop"
        check_schema(answer["text"])


def test_answers_are_json_objects(client):
    for seed in range(4):
        answer = choice(client, response_format={"type": "json_object"}, seed=seed, temperature=1, max_tokens=60)
        assert answer["text"].startswith("{")
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["text"]), dict)


def test_a_choice_is_exact_and_every_one_can_be_drawn(client):
    choices = ["yes", "yes, of course", "no"]
    drawn = set()
    for seed in range(10):
        answer = choice(client, structured_outputs={"choice": choices}, seed=seed, temperature=5)
        assert answer["finish_reason"] == "stop"
        drawn.add(answer["text"])
    assert drawn <= set(choices)
    assert len(drawn) > 1


def test_a_regular_expression_and_a_grammar_are_followed(client):
    for seed in range(2):
        answer = choice(client, structured_outputs={"regex": "[0-9]{3}-[a-f]{2,5}x"}, seed=seed)
        assert re.fullmatch("[0-9]{3}-[a-f]{2,5}x", answer["text"])
        assert answer["finish_reason"] == "stop"
        lark = 'start: pair ("," pair){2} ";"\npair: /[a-z]/ "=" /[0-9]{1,3}/\n'
        answer = choice(client, structured_outputs={"grammar": lark}, seed=seed)
        assert re.fullmatch("([a-z]=[0-9]{1,3},){2}[a-z]=[0-9]{1,3};", answer["text"])


def test_a_model_that_prefers_white_space_finishes(client):
    """Bounded white space: an object ends, although every token of white space is favoured."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    closed = schema | {"additionalProperties": False}
    for sampling in ({"temperature": 0}, {"temperature": 1, "seed": 3}):
        answer = choice(client, structured_outputs={"json": closed}, logit_bias=WHITE_SPACE, **sampling)
        assert answer["finish_reason"] == "stop"
        assert set(json.loads(answer["text"])) == {"a"}


def test_an_answer_that_is_cut_says_length(client):
    answer = choice(client, structured_outputs={"json": SCHEMA}, max_tokens=10)
    assert answer["finish_reason"] == "length"
    assert len(answer["text"]) <= 10
    answer = choice(
        client, response_format={"type": "json_object"}, logit_bias=WHITE_SPACE, max_tokens=40, temperature=0
    )
    assert answer["finish_reason"] == "length"  # white space inside of a string is text


def test_n_answers_of_a_stream_are_of_the_schema(client):
    response = post(client, structured_outputs={"json": SCHEMA}, n=3, stream=True, seed=7)
    texts = ["", "", ""]
    for line in response.text.split("\n\n")[:-2]:
        for part in json.loads(line.removeprefix("data: "))["choices"]:
            texts[part["index"]] += part["text"]
    for text in texts:
        check_schema(text)


def test_log_probabilities_stay_those_of_the_model(client):
    fields = {"prompt": "OnceZ~", "max_tokens": 0, "echo": True, "logprobs": 0}
    free = choice(client, **fields)["logprobs"]["token_logprobs"][-2:]
    constrained = choice(client, structured_outputs={"choice": ["Z~"]}, logprobs=3)["logprobs"]
    assert constrained["tokens"] == ["Z", "~"]
    assert constrained["token_logprobs"] == pytest.approx(free, abs=1e-3)


def test_constrained_and_free_requests_do_not_change_each_other(plain):
    """A grammar's answer, and that of a neighbour without one, are the same alone and in a crowd."""
    fields = [
        {"seed": 5},
        {"seed": 5, "structured_outputs": {"json": SCHEMA}},
        {"seed": 6, "structured_outputs": {"regex": "[a-z ]{40}"}},
        {"seed": 7, "response_format": {"type": "json_object"}, "max_tokens": 50},
    ]
    alone = [choice(plain, **one) for one in fields]
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda one: choice(plain, **one), fields * 2))
    assert crowd == alone * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1/x"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
    ],
)
def test_what_cannot_be_followed_is_a_400_before_the_engine(plain, fields, param):
    response = post(plain, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert "guided" not in param or "structured_outputs" in error["message"]


def test_a_grammar_that_becomes_too_expensive_fails_one_request(plain):
    with ThreadPoolExecutor(2) as pool:
        expensive = pool.submit(post, plain, structured_outputs={"regex": "[xy]{270}((a{100}){100}){20}"})
        other = pool.submit(choice, plain, structured_outputs={"regex": "[a-z]{150}"})
    assert expensive.result().status_code >= 500
    assert "grammar cannot go on" in expensive.result().json()["error"]["message"]
    assert len(other.result()["text"]) == 150


def test_chats_are_constrained(plain):
    fields = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200}
    response = plain.post("/v1/chat/completions", json=fields | {"structured_outputs": {"json": SCHEMA}})
    assert response.status_code == 200, response.text
    check_schema(response.json()["choices"][0]["message"]["content"])


def test_nothing_is_left_after_the_server_stops():
    app = create_app(tiny_service())
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert choice(client, structured_outputs={"choice": ["a"]})["text"] == "a"
        probes = [app.state.constraints._vocabulary._probes.get_nowait() for _ in range(2)]
        children = [probe._child for probe in probes if probe._child is not None]
        for probe in probes:
            app.state.constraints._vocabulary._probes.put(probe)
        assert len(children) == 1
        assert children[0].poll() is None
    assert children[0].poll() is not None
