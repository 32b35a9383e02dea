"""Completions: fields that are honoured or refused, and what the engine is asked for them."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from starlette.testclient import TestClient

import retnet
from retnet.data.tokenizer import DOCUMENT_START, ByteTokenizer
from retnet.serve.http.api.fields import SEED_STEP
from retnet.serve.http.app import create_app
from retnet.serve.http.settings import Settings
from tests.serve.http.server import LiveServer, live_server, tiny_server, tiny_service

LETTERS = {str(letter): 60 for letter in b"abcdefgh"}  # a bias that keeps the text to these letters


def post(client: TestClient, **fields):
    return client.post("/v1/completions", json={"prompt": "The river", **fields})


def answer(client: TestClient, **fields) -> dict:
    response = post(client, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def text(client: TestClient, **fields) -> str:
    [choice] = answer(client, **fields)["choices"]
    return choice["text"]


def refusal(client: TestClient, **fields) -> dict:
    response = post(client, **fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def chunks(client: TestClient, **fields) -> list[dict]:
    """The events of a stream, which ends with [DONE]."""
    response = post(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [True, False]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": 3}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": ["a" * 2049, "b" * 2048]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"user": "u" * 513}, "user"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"model": 3}, "model"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_a_malformed_field_is_named_before_the_engine_sees_it(client, fields, param):
    error = refusal(client, **fields)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": NaN}',
        b'{"prompt": "a", "response_format": {"type": "text", "strict": -Infinity}}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a\x00"}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a"',
        b"",
    ],
)
def test_a_body_that_is_no_strict_json_is_refused(client, body):
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("the body is not JSON")


@pytest.mark.parametrize("body", [b"[]", b"null", b'"a"', b'{"prompt": "a", "temperature": 1e999}'])
def test_json_of_another_kind_is_refused(client, body):
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_values_that_clients_send_by_default_are_taken(client):
    neutral = {
        "n": None, "seed": None, "stop": None, "logit_bias": None, "logprobs": None, "echo": None, "stream": None,
        "stream_options": None, "user": "me", "metadata": {"a": "b"}, "model": "tiny", "best_of": 1, "suffix": None,
        "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0.0,
        "repetition_penalty": 1, "store": False, "service_tier": "auto", "skip_special_tokens": True,
        "use_beam_search": False, "length_penalty": 1.0, "stop_token_ids": [], "ignore_eos": False,
    }  # fmt: skip
    plain = text(client, temperature=0)
    assert text(client, **neutral) == plain
    assert text(client, **(neutral | {"top_k": 0, "stop": []})) == plain
    assert text(client, temperature=1e-9, seed=-5) == plain
    assert text(client, top_p=0, seed=5) == plain
    assert text(client, top_k=1, seed=5) == plain


@pytest.mark.parametrize(
    ("fields", "param", "advice"),
    [
        ({"suffix": "x"}, "suffix", "do not fill gaps"),
        ({"best_of": 3, "n": 2}, "best_of", "accepted: null, 1, or n"),
        ({"use_beam_search": True}, "use_beam_search", "no beam search"),
        ({"guided_json": {}}, "guided_json", "structured_outputs"),
        ({"messages": []}, "messages", "/v1/chat/completions"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "never cut"),
        ({"tempature": 1}, "tempature", "did you mean temperature?"),
        ({"xyzzy": 1}, "xyzzy", "accepted: model,"),
    ],
)
def test_a_field_that_is_not_honoured_is_named_with_advice(client, fields, param, advice):
    error = refusal(client, **fields)
    assert error["param"] == param
    assert advice in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5, 257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[5], [10**12]]}, "prompt"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
    ],
)
def test_token_ids_are_checked_against_the_vocabulary(client, fields, param):
    error = refusal(client, **fields)
    assert error["param"] == param
    assert "0 to 256" in error["message"]


def test_the_first_and_the_last_token_of_the_vocabulary_are_taken(client):
    fields = {"logit_bias": {"0": 1, "256": -1}, "stop_token_ids": [0, 256]}
    assert answer(client, prompt=[0, 256], **fields)["usage"]["prompt_tokens"] == 2


def test_a_negative_seed_is_taken_modulo_two_to_the_63(client):
    assert text(client, seed=-5) == text(client, seed=2**63 - 5) != text(client, seed=5)


def test_an_empty_prompt_is_the_document_start_alone(client):
    same = {"seed": 3, "max_tokens": 8}
    [expected] = answer(client, prompt=[DOCUMENT_START], **same)["choices"]
    for prompt in ("", [], [""], [[]]):
        given = answer(client, prompt=prompt, **same)
        assert given["choices"] == [expected]
        assert given["usage"]["prompt_tokens"] == 1


def test_a_text_is_read_after_one_document_start_and_ids_as_they_are(client):
    """What is spelled like a special token is text."""
    same = {"temperature": 0, "max_tokens": 4}
    spelled = "a <|document|>"
    as_text = answer(client, prompt=spelled, **same)
    as_ids = answer(client, prompt=[DOCUMENT_START, *spelled.encode()], **same)
    assert as_text["choices"] == as_ids["choices"]
    assert as_text["usage"]["prompt_tokens"] == as_ids["usage"]["prompt_tokens"] == 1 + len(spelled)


def test_what_does_not_fit_into_the_context_is_refused_with_both_numbers(client):
    error = refusal(client, prompt="x" * 500, max_tokens=20)
    assert error["code"] == "context_length_exceeded"
    for number in ("501", "20", "512"):
        assert number in error["message"]
    assert answer(client, prompt="x" * 500, max_tokens=11)["usage"]["total_tokens"] == 512
    error = refusal(client, prompt="x" * 600)
    assert error["code"] == "context_length_exceeded"
    assert "601" in error["message"]
    assert "512" in error["message"]
    assert answer(client, prompt="x" * 500)["usage"]["completion_tokens"] == 11  # the default fits itself in


def test_the_servers_own_limits_are_named():
    with tiny_server(Settings(max_new_tokens=8, max_prompt_tokens=20)) as client:
        assert answer(client)["usage"]["completion_tokens"] == 8
        assert answer(client, max_tokens=8)["usage"]["completion_tokens"] == 8
        assert "at most 8" in refusal(client, max_tokens=9)["message"]
        error = refusal(client, prompt="x" * 30)
        assert "31 tokens" in error["message"]
        assert "at most 20" in error["message"]
        error = refusal(client, prompt=["a"] * 30)
        assert "30 choices; accepted: 20" in error["message"]  # 4 slots and 16 that wait


def test_a_response_of_too_much_memory_is_refused():
    with tiny_server(max_tokens=None) as client:
        error = refusal(client, prompt="x" * 30_000, echo=True, logprobs=20, max_tokens=1)
        assert error["param"] == "logprobs"
        assert str(21 * 30_002) in error["message"]
        error = refusal(client, max_tokens=30_000, logprobs=0, n=18)
        assert error["param"] == "logprobs"
        error = refusal(client, prompt="x" * 900_000, n=20)
        assert error["param"] == "prompt"
        assert str(20 * 900_001) in error["message"]


def test_both_names_of_the_token_limit_are_taken(client):
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
        assert answer(client, **fields)["usage"]["completion_tokens"] == 5
    error = refusal(client, max_tokens=5, max_completion_tokens=6)
    assert error["param"] == "max_completion_tokens"


def test_another_models_name_is_not_found(client):
    response = post(client, model="gpt-4")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_a_stream_has_the_text_of_the_whole_response(client):
    for seed in range(3):
        fields = {"seed": seed, "max_tokens": 40, "stop": ["\ufffd\ufffd\ufffd"], "logprobs": 1}
        [whole] = answer(client, **fields)["choices"]
        events = [chunk["choices"][0] for chunk in chunks(client, **fields)]
        assert "".join(event["text"] for event in events) == whole["text"]
        assert [event["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1]["finish_reason"] == whole["finish_reason"]
        assert whole["finish_reason"] in ("length", "stop")
        for name, values in whole["logprobs"].items():
            assert [value for e in events if e["logprobs"] for value in e["logprobs"][name]] == values


def test_events_without_log_probabilities_have_one_form(client):
    events = chunks(client, max_tokens=6, logit_bias=LETTERS)
    assert len({event["id"] for event in events}) == 1
    for event in events:
        assert event.keys() == {"id", "object", "created", "model", "choices"}
        assert event["object"] == "text_completion"
        [choice] = event["choices"]
        assert choice.keys() - {"stop_reason"} == {"index", "text", "logprobs", "finish_reason"}


def test_the_usage_is_a_chunk_only_where_it_is_asked_for(client):
    asked = {"include_usage": True}
    *events, last = chunks(client, max_tokens=6, logit_bias=LETTERS, stream_options=asked)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["total_tokens"] == 16
    assert all(event["usage"] is None for event in events)
    counted = chunks(client, max_tokens=6, logit_bias=LETTERS, stream_options=asked | {"continuous_usage_stats": True})
    totals = [event["usage"]["completion_tokens"] for event in counted]
    assert totals == sorted(totals)
    assert totals[-1] == 6
    assert not any("usage" in event for event in chunks(client, stream_options={"include_usage": False}))


def test_stop_strings_end_the_text_and_say_which(client):
    fields = {"seed": 1, "max_tokens": 30, "logit_bias": LETTERS}
    full = text(client, **fields)
    stop = full[10:13]
    given = answer(client, stop=["zzz", stop], **fields)
    [choice] = given["choices"]
    assert choice["text"] == full[: full.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert given["usage"]["completion_tokens"] == full.index(stop) + 3
    assert text(client, stop=full[-1] + "zz", **fields) == full  # begun, and not completed


def test_stop_tokens_end_the_text_and_are_left_out(client):
    fields = {"seed": 1, "max_tokens": 30, "logit_bias": LETTERS}
    full = text(client, **fields)
    token = full[8].encode()[0]
    [choice] = answer(client, stop_token_ids=[token], logprobs=0, **fields)["choices"]
    assert choice["text"] == full[: full.index(full[8])]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_a_stop_string_that_is_spelled_as_a_special_token_stops_there(client):
    bias = {str(DOCUMENT_START): 100}
    [choice] = answer(client, stop="<|document|>", logit_bias=bias)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "<|document|>")


def test_choices_have_their_own_index_seed_and_end(client):
    fields = {"seed": 7, "max_tokens": 12, "logit_bias": LETTERS}
    fields["stop"] = text(client, **fields)[5:8]  # ends the first
    given = answer(client, prompt=["The river", "A"], n=3, **fields)
    assert [choice["index"] for choice in given["choices"]] == list(range(6))
    assert len({choice["finish_reason"] for choice in given["choices"]}) == 2
    for place, choice in enumerate(given["choices"]):
        prompt, i = ["The river", "A"][place // 3], place % 3
        seed = (7 + i * SEED_STEP) % 2**63
        [alone] = answer(client, prompt=prompt, **(fields | {"seed": seed}))["choices"]
        assert alone | {"index": place} == choice
    texts, ends = [""] * 6, [None] * 6
    for chunk in chunks(client, prompt=["The river", "A"], n=3, **fields):
        [event] = chunk["choices"]
        assert ends[event["index"]] is None
        texts[event["index"]] += event["text"]
        ends[event["index"]] = event["finish_reason"]
    assert texts == [choice["text"] for choice in given["choices"]]
    assert ends == [choice["finish_reason"] for choice in given["choices"]]
    assert given["usage"]["prompt_tokens"] == 10 + 2


def test_a_seed_means_the_same_alone_and_in_a_crowd():
    """The same text as `retnet.generate`, with other requests in the other slots or without."""
    prompts = ["The river", "état", "a", "The lake is "]
    with tiny_server() as client:
        model = client.app.state.service.engine.model
        cases = [
            {"prompt": prompts[i % 4], "seed": i, "temperature": 0.5 + 0.1 * i, "max_tokens": 10 + 3 * i}
            for i in range(8)
        ]
        for i, case in enumerate(cases):
            case |= [{}, {"top_k": 5}, {"top_p": 0.7}, {"presence_penalty": 1.0}][i % 4]
        with ThreadPoolExecutor(8) as pool:
            crowd = list(pool.map(lambda case: text(client, **case), cases))
        for case, given in zip(cases, crowd, strict=True):
            assert text(client, **case) == given
            options = dict(case)
            assert retnet.generate(model, options.pop("prompt"), tokenizer=ByteTokenizer(), **options) == given


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("prompt", ["The é", [84, 104, 195, 169]])
def test_echo_with_log_probabilities_scores_the_prompt(client, prompt, max_tokens):
    """One entry per token of the prompt and the output; those of lm-eval's loglikelihood have max_tokens 1."""
    fields = {"echo": True, "logprobs": 1, "temperature": 0, "max_tokens": max_tokens}
    given = answer(client, prompt=prompt, **fields)
    [choice] = given["choices"]
    shown = ByteTokenizer().decode(prompt) if isinstance(prompt, list) else prompt
    assert choice["text"].startswith(shown)
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    ids = prompt if isinstance(prompt, list) else [DOCUMENT_START, *prompt.encode()]
    known = [token for token in ids if token != DOCUMENT_START]
    count = len(known) + max_tokens
    assert {len(values) for values in logprobs.values()} == {count}
    assert logprobs["text_offset"][: len(known)] == [
        len(bytes(known[:i]).decode(errors="ignore")) for i in range(len(known))
    ]
    model = client.app.state.service.engine.model
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    first = len(ids) - len(known)
    for place, token in enumerate(known):
        value, top = logprobs["token_logprobs"][place], logprobs["top_logprobs"][place]
        if first + place == 0:
            assert value is None
            assert top is None
            continue
        row = expected[first + place - 1]
        assert math.isclose(value, row[token], abs_tol=1e-4)
        assert value in top.values()
        assert math.isclose(max(top.values()), row.max(), abs_tol=1e-4)
    if max_tokens:
        assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
    joined = chunks(client, prompt=prompt, **fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in joined) == choice["text"]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in joined]
    assert [x for entry in streamed if entry for x in entry["token_logprobs"]] == logprobs["token_logprobs"]


def test_an_end_token_after_an_echoed_prompt_has_an_entry(client):
    """lm-eval leaves out the last entry, whatever ended the output."""
    token = text(client, temperature=0, max_tokens=1, logprobs=0, logit_bias=LETTERS).encode()[0]
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "logit_bias": LETTERS}
    [choice] = answer(client, stop_token_ids=[token], **fields)["choices"]
    assert len(choice["logprobs"]["tokens"]) == len("The river") + 1
    assert choice["text"] == "The river"


def test_the_true_token_is_among_the_log_probabilities_of_any_number(client):
    for wanted in (0, 1, 20):
        [choice] = answer(client, seed=2, logprobs=wanted, max_tokens=8, temperature=5)["choices"]
        logprobs = choice["logprobs"]
        for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            assert math.isfinite(value)
            assert value in top.values()
            assert wanted <= len(top) <= wanted + 1


def test_cached_tokens_are_reported_and_a_miss_says_why():
    with tiny_server(prefix_cache_bytes=10**7) as client:
        prompt = "The river bends twice before it reaches the town. " * 4
        first = answer(client, prompt=prompt, max_tokens=2)["usage"]["prompt_tokens_details"]
        assert first["cached_tokens"] == 0
        assert first["prefix_miss"]
        second = answer(client, prompt=prompt, max_tokens=2)["usage"]["prompt_tokens_details"]
        assert second == {"cached_tokens": len(prompt)}  # all but the last token, after the document start
    with tiny_server() as client:
        details = answer(client)["usage"]["prompt_tokens_details"]
        assert details == {"cached_tokens": 0, "prefix_miss": "the engine has no prefix cache"}


def test_an_error_after_the_first_chunk_is_an_event_that_ends_the_stream():
    decode, calls = ByteTokenizer().decode, []

    def failing(tokens) -> str:
        calls.append(tokens)
        if len(calls) > 8:
            raise RuntimeError("no text")
        return decode(tokens)

    with tiny_server(decode=failing) as client:
        response = post(client, stream=True, stop=["zzz"], max_tokens=50, logit_bias=LETTERS)
        assert response.status_code == 200
        *events, last, rest = response.text.split("\n\n")
        assert rest == ""
        assert "[DONE]" not in response.text
        assert any(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "no text" in error["message"]
        assert error["type"] == "server_error"
        response = post(client, stop=["zzz"], max_tokens=50)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert answer(client)["usage"]["completion_tokens"] == 16  # a request without stop strings


def test_the_document_start_before_a_text_does_not_count_for_penalties(client):
    """It counts where the client wrote it: its logit is negative here, and the penalty outweighs the bias."""
    fields = {"temperature": 0, "repetition_penalty": 1e6, "logit_bias": {str(DOCUMENT_START): 30}, "max_tokens": 1}
    fields["stop_token_ids"] = [DOCUMENT_START]
    river = [*b"The river"]
    assert answer(client, **fields)["choices"][0]["finish_reason"] == "stop"
    assert answer(client, prompt=[DOCUMENT_START, *river], **fields)["choices"][0]["finish_reason"] == "length"
    session = answer(client, prompt="The", max_tokens=0, keep_session=True)["session"]["id"]
    continued = answer(client, prompt=" river", session_id=session, **fields)
    assert continued["choices"][0]["finish_reason"] == "stop"


def sent(server: LiveServer, body: dict) -> socket.socket:
    """A connection that has sent a request."""
    data = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
    return connection


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 6])  # 4 slots: two of six wait
def test_a_client_that_leaves_frees_every_place(stream, n):
    with live_server() as server:
        service = server.service
        ordinary = service.engine.step

        def step():  # an engine that is still busy when the client leaves
            time.sleep(0.02)
            return ordinary()

        service.engine.step = step
        body = {"prompt": "a", "max_tokens": 500, "n": n, "stream": stream, "ignore_eos": True}
        with sent(server, body) as connection:
            if stream:
                assert b"200 OK" in connection.recv(2**16)
            wait_for(lambda: service.num_streams == n)
        wait_for(lambda: service.num_streams == 0)
        assert service.engine.stats().new_tokens < 4 * 500


def test_a_request_that_was_left_leaves_the_prefix_cache_right():
    """Left while it waits, while its prompt is read, and while it generates."""
    prompt = "The river bends twice before it reaches the town. " * 8
    options = {"prompt_chunk": 32, "prompt_budget": 32, "prefix_cache_bytes": 10**7, "num_slots": 1}
    body = {"prompt": prompt, "seed": 4, "max_tokens": 12, "logprobs": 0}
    with tiny_server(prompt_chunk=32, num_slots=1) as client:
        [expected] = answer(client, **body)["choices"]
    for steps in (0, 4, 20):  # the prompt takes 13
        with live_server(**options) as server:
            reached, left, calls = threading.Event(), threading.Event(), []
            ordinary = server.service.engine.step

            def step(reached=reached, left=left, calls=calls, ordinary=ordinary, steps=steps):
                calls.append(1)
                if len(calls) > steps:
                    reached.set()
                    left.wait(30)
                return ordinary()

            server.service.engine.step = step
            with sent(server, body | {"max_tokens": 90}):
                assert reached.wait(30)
            time.sleep(0.05)  # the server hears of it
            left.set()
            with httpx.Client(base_url=server.url, timeout=60) as client:
                [choice] = client.post("/v1/completions", json=body).json()["choices"]
            assert choice["text"] == expected["text"]
            values = (c["logprobs"]["token_logprobs"] for c in (choice, expected))
            assert all(math.isclose(one, other, abs_tol=1e-4) for one, other in zip(*values, strict=True))


def test_a_session_goes_on_and_says_what_was_reused(client):
    fields = {"seed": 5, "temperature": 0.9}
    whole = text(client, max_tokens=12, **fields)
    first = answer(client, max_tokens=5, keep_session=True, **fields)
    session = first["session"]["id"]
    second = answer(client, prompt="", max_tokens=7, session_id=session, **fields)
    assert first["session"]["reused_tokens"] == 0
    assert second["session"]["reused_tokens"] == 1 + len("The river") + 5 - 1
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == second["session"]["reused_tokens"]
    joined = [c["text"] for r in (first, second) for c in r["choices"]]
    assert "".join(joined) == whole or "\ufffd" in "".join(joined)
    [event] = [e for e in chunks(client, prompt="b", max_tokens=3, session_id=session) if "session" in e]
    assert event["choices"][0]["finish_reason"] == "length"
    assert event["session"]["id"] == session
    assert refusal(client, prompt=["a", "b"], session_id=session)["param"] == "prompt"
    assert refusal(client, n=2, keep_session=True)["param"] == "keep_session"


def test_a_prompt_that_replaces_the_end_of_a_session_is_scored_without_its_first_token(client):
    """The token that ended the session's output gives way to it, so the state has not read what comes before."""
    token = text(client, temperature=0, max_tokens=1, logit_bias=LETTERS).encode()[0]
    ended = answer(client, temperature=0, stop_token_ids=[token], logit_bias=LETTERS, keep_session=True)
    assert ended["choices"][0]["finish_reason"] == "stop"
    session = ended["session"]["id"]
    [choice] = answer(client, prompt="xyz", session_id=session, echo=True, logprobs=0, max_tokens=1)["choices"]
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert len(others) == 3
    assert None not in others


def test_every_field_is_described_in_the_schema():
    schema = create_app(tiny_service()).openapi()
    body = schema["components"]["schemas"]["CompletionBody"]["properties"]
    assert {"prompt", "temperature", "stop", "logit_bias", "session_id"} <= body.keys()
    assert [name for name, field in body.items() if not field.get("description")] == []
    assert body["prompt"]["examples"] == ["The river"]
    responses = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert responses.keys() == {"200", "default"}
    assert responses["200"]["content"].keys() == {"application/json", "text/event-stream"}
