"""Random completions at the same time, beside a naive reference that samples each alone."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

from starlette.testclient import TestClient

from retnet.data.tokenizer import ByteTokenizer
from retnet.serve.engine import Engine
from retnet.serve.http.app import create_app
from retnet.serve.http.service import Service
from retnet.serve.request import Generation
from tests.serve.naive import Case, check
from tests.small_models import BYTES, small_model

TOKENIZER = ByteTokenizer()


def random_body(rng: random.Random) -> dict:
    text = rng.choice(["The river", "état", "", "The river bends twice before it reaches the town. " * 2])
    letters = {str(letter): rng.choice([20, 30]) for letter in b"abcdefgh\xc3\xa9"}
    body = {
        "prompt": text,
        "max_tokens": rng.randint(1, 20),
        "temperature": rng.choice([0, 0.3, 1, 1.7]),
        "top_k": rng.choice([None, -1, 0, 4]),
        "top_p": rng.choice([None, 1, 0.5]),
        "min_p": rng.choice([None, 0, 0.1]),
        "presence_penalty": rng.choice([None, 0, 0.7]),
        "frequency_penalty": rng.choice([None, 0.3, -0.2]),
        "logit_bias": rng.choice([None, letters, letters, letters]),
        "logprobs": rng.choice([None, 0, 3]),
        "stop": rng.choice([None, "a", ["bc", "dd", "é"]]),
        "stop_token_ids": rng.choice([None, [99]]),
        "seed": rng.choice([None, rng.randrange(2**63)]),
        "stream": rng.random() < 0.5,
    }
    if rng.random() < 0.5:
        body |= {"prompt": [*text.encode()] or [256], "repetition_penalty": rng.choice([1.3, 0.8])}
    return body


def served(client: TestClient, body: dict) -> tuple[str, str]:
    """Text and finish reason of a completion."""
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not body["stream"]:
        [choice] = response.json()["choices"]
        return choice["text"], choice["finish_reason"]
    events = [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n") if e.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    return "".join(c["text"] for c in choices), choices[-1]["finish_reason"]


def test_every_completion_of_a_crowd_is_that_of_the_naive_reference():
    rng, submitted = random.Random(0), []
    model = small_model(**BYTES, dtype="float64")
    engine = Engine(model, num_slots=4, decode=TOKENIZER.decode, prefix_cache_bytes=10**6, prompt_chunk=16)
    submit = engine.submit
    service = Service(engine, TOKENIZER, "tiny")
    with TestClient(create_app(service), base_url="http://127.0.0.1:8000") as client:

        def recorded(*arguments) -> Generation:
            submitted.append(submit(*arguments))
            return submitted[-1]

        engine.submit = recorded
        bodies = [random_body(rng) for _ in range(40)]
        with ThreadPoolExecutor(12) as pool:
            results = list(pool.map(lambda body: served(client, body), bodies))
    cases = [Case(g, list(g.seen[: g.output_start]), g.output_start, g.ends) for g in submitted]
    assert check(model, cases, TOKENIZER.decode) <= 2
    expected = sorted(shown(generation) for generation in submitted)
    assert sorted(results) == expected
    assert {reason for _, reason in expected} == {"length", "stop"}
    assert any(generation.cached for generation in submitted)


def shown(generation: Generation) -> tuple[str, str]:
    """The text and finish reason that a client is to see."""
    reason, tokens = generation.finish_reason, generation.tokens
    text = TOKENIZER.decode(tokens[:-1] if reason == "stop_token" else tokens)
    if reason == "stop_string":
        text = text[: min(text.find(stop) for stop in generation.request.stop_strings if stop in text)]
    return text, "length" if reason == "length" else "stop"
