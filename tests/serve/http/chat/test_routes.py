"""Chat: what of a conversation reaches the engine, and what comes back."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from retnet.data.chat_template import ChatTemplate, find_chat_template
from retnet.data.tokenizer import DOCUMENT_START
from retnet.serve.engine import Engine
from retnet.serve.http.app import create_app
from retnet.serve.http.chat.routes import WRITTEN_AT_A_TIME
from retnet.serve.http.service import Service
from retnet.serve.http.settings import Settings
from tests.serve.http.chat.models import TOOLS, save_tokenizer
from tests.serve.http.server import MODEL_NAME, tiny_server
from tests.small_models import small_model

LETTERS = {str(letter): 60 for letter in b"abcdefgh"}  # a bias that keeps the text to these letters
HELLO = [{"role": "user", "content": "Hello"}]
PROMPT = "User:\nHello\nAssistant:\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"day": {"enum": ["a", "b"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client():
    with tiny_server(prefix_cache_bytes=2**20) as client:
        yield client


def post(client: TestClient, messages=HELLO, **fields):
    return client.post("/v1/chat/completions", json={"messages": messages, **fields})


def answer(client: TestClient, messages=HELLO, **fields) -> dict:
    response = post(client, messages, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(client: TestClient, messages=HELLO, **fields) -> dict:
    response = post(client, messages, **fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def chunks(client: TestClient, messages=HELLO, **fields) -> list[dict]:
    """The events of a stream, which ends with [DONE]."""
    response = post(client, messages, stream=True, **fields)
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def completion(client: TestClient, prompt, **fields) -> dict:
    """The same through /v1/completions, with the prompt as token ids."""
    tokens = [DOCUMENT_START, *prompt.encode()] if isinstance(prompt, str) else prompt
    response = client.post("/v1/completions", json={"prompt": tokens, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_is_the_completion_of_the_written_conversation(client):
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    fields = {"seed": 1, "max_tokens": 12, "logit_bias": LETTERS}
    body = answer(client, messages, **fields)
    expected = completion(client, "System:\nBe brief.\n" + PROMPT, **fields)
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected["choices"][0]["text"], "refusal": None}
    assert choice["finish_reason"] == "length"
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL_NAME
    assert body["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(client):
    fields = {"seed": 2, "max_tokens": 9, "logit_bias": LETTERS}
    first, *rest = chunks(client, **fields)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (
        "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in rest)
        == (answer(client, **fields)["choices"][0]["message"]["content"])
    )
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in (first, *rest)]
    assert reasons == [None] * len(rest) + ["length"]
    assert {chunk["object"] for chunk in rest} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in rest)


def test_the_usage_of_a_stream_comes_last_and_only_if_asked(client):
    *others, last = chunks(client, max_tokens=4, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in others)
    running = chunks(client, max_tokens=4, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in running]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_choices_have_their_own_index_seed_and_finish(client):
    fields = {"n": 3, "seed": 5, "max_tokens": 6, "logit_bias": LETTERS}
    body = answer(client, **fields)
    expected = [choice["text"] for choice in completion(client, PROMPT, **fields)["choices"]]
    assert [choice["message"]["content"] for choice in body["choices"]] == expected
    assert len(set(expected)) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chunks(client, **fields):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert list(streamed.values()) == expected


def test_log_probabilities_have_the_form_of_chats(client):
    fields = {"logprobs": True, "top_logprobs": 3, "seed": 1, "max_tokens": 5, "logit_bias": LETTERS}
    [choice] = answer(client, **fields)["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == choice["message"]["content"]
    for token in content:
        assert math.isfinite(token["logprob"])
        assert bytes(token["bytes"]).decode() == token["token"]
        assert len(token["top_logprobs"]) in (3, 4)
        assert token["token"] in [top["token"] for top in token["top_logprobs"]]
    streamed = [
        token
        for chunk in chunks(client, **fields)
        for choice in chunk["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    [plain] = answer(client, logprobs=True, max_tokens=2)["choices"]
    assert [token["top_logprobs"] for token in plain["logprobs"]["content"]] == [[], []]


def test_an_answer_ends_where_another_turn_begins(client):
    """With a bias that spells the stop string of the plain template; its text is not sent."""
    grammar = {"structured_outputs": {"regex": "ab\nUser:\nmore"}}
    [choice] = answer(client, max_tokens=40, **grammar)["choices"]
    assert choice["message"]["content"] == "ab"
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] is None
    [own] = answer(client, max_tokens=40, stop="b", **grammar)["choices"]
    assert (own["message"]["content"], own["stop_reason"]) == ("a", "b")


def test_json_is_enforced_and_says_length_when_cut(client):
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}}  # fmt: skip
    fields = {"response_format": {"type": "json_schema", "json_schema": schema}, "seed": 3}
    [choice] = answer(client, max_tokens=200, **fields)["choices"]
    assert json.loads(choice["message"]["content"])["a"] in (1, 2)
    assert choice["finish_reason"] == "stop"
    [cut] = answer(client, max_tokens=3, **fields)["choices"]
    assert cut["finish_reason"] == "length"


def test_no_length_is_the_room_that_is_left(client):
    long = [{"role": "user", "content": "x" * 460}]
    [choice] = answer(client, long, seed=1, logit_bias=LETTERS)["choices"]
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["content"]) == 512 - len(PROMPT) - 1 - 460 + len("Hello")


def test_the_last_message_can_be_continued(client):
    messages = [*HELLO, {"role": "assistant", "content": "Once upon "}]
    fields = {"seed": 1, "max_tokens": 8, "logit_bias": LETTERS}
    text = answer(client, messages, continue_final_message=True, **fields)["choices"][0]["message"]["content"]
    assert text == completion(client, PROMPT + "Once upon ", **fields)["choices"][0]["text"]
    open_text = answer(client, add_generation_prompt=False, **fields)["choices"][0]["message"]["content"]
    assert open_text == completion(client, "User:\nHello", **fields)["choices"][0]["text"]


def test_the_repetition_penalty_counts_texts_and_not_the_template(client, monkeypatch):
    engine, requests = client.app.state.service.engine, []
    submit = engine.submit
    monkeypatch.setattr(
        engine, "submit", lambda request, after=None: requests.append(request) or submit(request, after)
    )
    messages = [{"role": "system", "content": "fox"}, {"role": "user", "content": [{"type": "text", "text": "ox!"}]}]
    answer(client, messages, max_tokens=1, repetition_penalty=1.5)
    answer(client, messages, max_tokens=1)
    assert [set(request.counted or ()) for request in requests] == [set(b"fox!"), set()]


def test_template_options_reach_the_template(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}{% if thinking is true %} THINK{% endif %}")
    with tiny_server(Settings(chat_template=str(tmp_path / "t.jinja"))) as client:
        with_it = answer(client, chat_template_kwargs={"thinking": True}, max_tokens=1)["usage"]["prompt_tokens"]
        assert with_it == 1 + len("Hello THINK")
        assert answer(client, max_tokens=1)["usage"]["prompt_tokens"] == 1 + len("Hello")
        assert "messages" in refusal(client, chat_template_kwargs={"messages": []})["message"]


def test_a_server_without_a_template_says_so():
    with tiny_server(Settings(chat_template="none")) as client:
        error = refusal(client)
        assert "no chat template" in error["message"]
        assert "/v1/completions" in error["message"]


def test_a_template_that_refuses_a_conversation_is_a_400(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('only one message, please') }}")
    with tiny_server(Settings(chat_template=str(tmp_path / "t.jinja"))) as client:
        assert "only one message, please" in refusal(client)["message"]
        assert post(client, stream=True).status_code == 400


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [{"type": "code"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"prompt": "x"}, "prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"n": 1000}, "n"),
        ({"temprature": 1}, "temperature"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: ("}}, "grammar"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"chat_template_kwargs": {"_x": 1}}, "chat_template_kwargs"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"session_id": 3}, "session_id"),
    ],
)
def test_what_is_not_honoured_is_named(client, fields, named):
    error = refusal(client, **fields)
    assert named in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_conversation_that_is_too_long_is_refused_and_not_cut(client):
    error = refusal(client, [{"role": "user", "content": "x" * 600}])
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    assert str(600 + len(PROMPT) - len("Hello") + 1) in error["message"]


def test_defaults_that_clients_send_change_nothing(client):
    neutral = {
        "n": 1, "top_p": 1, "top_k": 0, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": None,
        "stop": None, "tools": None, "tool_choice": None, "functions": None, "modalities": ["text"], "logprobs": False,
        "top_logprobs": 0, "response_format": {"type": "text"}, "parallel_tool_calls": True, "store": False,
        "service_tier": "auto", "user": "me", "metadata": {"a": "b"}, "stream": False, "reasoning_effort": None,
    }  # fmt: skip
    fields = {"seed": 1, "max_tokens": 5}
    assert answer(client, **fields, **neutral)["choices"] == answer(client, **fields)["choices"]


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory):
    """A server of a byte model whose template describes Hermes's calls."""
    file = tmp_path_factory.mktemp("template") / "tools.jinja"
    file.write_text(TOOLS)
    with tiny_server(Settings(chat_template=str(file)), max_tokens=2048) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_is_enforced_and_read(with_tools, choice):
    fields = {"tools": [TOOL], "tool_choice": choice, "seed": 1, "max_tokens": 300, "parallel_tool_calls": False}
    [made] = answer(with_tools, **fields)["choices"]
    assert made["finish_reason"] == "tool_calls"
    assert made["message"]["content"] is None
    [call] = made["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["day"] in ("a", "b")
    deltas = [chunk["choices"][0] for chunk in chunks(with_tools, **fields)]
    parts = [part for delta in deltas for part in delta["delta"].get("tool_calls", ())]
    assert parts[0]["id"].startswith("call_")
    assert parts[0]["function"]["name"] == "weather"
    assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
    assert deltas[-1]["finish_reason"] == "tool_calls"
    assert not any(delta["delta"].get("content") for delta in deltas)


def test_a_call_that_is_cut_is_text_and_says_length(with_tools):
    [made] = answer(with_tools, tools=[TOOL], tool_choice="required", max_tokens=20)["choices"]
    assert made["finish_reason"] == "length"
    assert made["message"]["content"].startswith("<tool_call>")
    assert "tool_calls" not in made["message"]


def test_an_answer_that_is_cut_after_a_call_says_length(with_tools):
    fields = {"tools": [TOOL], "tool_choice": "required", "seed": 1}
    [one] = answer(with_tools, max_tokens=300, parallel_tool_calls=False, **fields)["choices"]
    call = one["message"]["tool_calls"][0]["function"]
    length = len(f'<tool_call>\n{{"name": "weather", "arguments": {call["arguments"]}}}\n</tool_call>') + 5
    # Forced to go on: after a call, a second one may follow.
    bias = {str(DOCUMENT_START): -100}
    [made] = answer(with_tools, max_tokens=length, logit_bias=bias, **fields)["choices"]
    assert made["message"]["tool_calls"]
    assert made["finish_reason"] == "length"


def test_an_answer_to_a_call_and_the_call_itself_can_be_sent_back(with_tools):
    made = answer(with_tools, tools=[TOOL], tool_choice="required", max_tokens=300, parallel_tool_calls=False)
    message = made["choices"][0]["message"]
    messages = [*HELLO, message, {"role": "tool", "content": "sun", "tool_call_id": message["tool_calls"][0]["id"]}]
    assert answer(with_tools, messages, tools=[TOOL], max_tokens=3)["usage"]["completion_tokens"] == 3


def test_tools_without_a_choice_are_told_to_the_model_and_none_hides_them(with_tools):
    def length(**fields):
        return answer(with_tools, max_tokens=1, **fields)["usage"]["prompt_tokens"]

    assert length(tools=[TOOL]) == length(tools=[TOOL], tool_choice="auto") > length()
    assert length(tools=[TOOL], tool_choice="none") == length()


def test_a_call_cannot_be_enforced_beside_another_form(with_tools):
    error = refusal(with_tools, tools=[TOOL], tool_choice="required", response_format={"type": "json_object"})
    assert "accepted: one" in error["message"]


def turn(client, text, session=None, **fields):
    more = {} if session is None else {"session_id": session["id"]}
    body = answer(
        client, [{"role": "user", "content": text}], keep_session=True, max_tokens=8, seed=1, **more, **fields
    )
    return body["choices"][0]["message"]["content"], body["session"], body


def test_a_session_goes_on_with_the_new_message_alone(client):
    first, session, _ = turn(client, "Hello", logit_bias=LETTERS)
    second, moved, body = turn(client, "More", session, logit_bias=LETTERS)
    assert moved["id"] == session["id"]
    assert moved["reused_tokens"] == session["tokens"] - 1
    assert moved["not_reused"] is None
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] >= moved["reused_tokens"]
    whole = [*HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": "More"}]
    assert body["usage"]["prompt_tokens"] == answer(client, whole, max_tokens=1)["usage"]["prompt_tokens"]
    kept = client.get(f"/v1/sessions/{session['id']}", params={"messages": "true"}).json()
    assert [message["content"] for message in kept["messages"]] == ["Hello", first, "More", second]


def test_any_answer_is_continued_from_its_state_whatever_bytes_it_has(client):
    """A random model writes bytes that are no characters; their text would have other tokens."""
    _, session, _ = turn(client, "Hello", temperature=2.0)
    _, moved, _ = turn(client, "More", session, temperature=2.0)
    assert moved["reused_tokens"] == session["tokens"] - 1


def test_a_session_of_another_conversation_says_why_it_is_not_reused(client):
    response = client.post("/v1/completions", json={"prompt": "The river", "max_tokens": 4, "keep_session": True})
    session = response.json()["session"]
    _, moved, _ = turn(client, "Hello", session)
    assert moved["reused_tokens"] == 0
    assert "begin the conversation" in moved["not_reused"]


def test_a_continued_message_is_kept_as_one(client):
    messages = [*HELLO, {"role": "assistant", "content": "Once "}]
    fields = {"max_tokens": 4, "seed": 1, "logit_bias": LETTERS}
    body = answer(client, messages, keep_session=True, continue_final_message=True, **fields)
    text = "Once " + body["choices"][0]["message"]["content"]
    _, moved, more = turn(client, "More", body["session"])
    assert moved["reused_tokens"] == body["session"]["tokens"] - 1
    whole = [*HELLO, {"role": "assistant", "content": text}, {"role": "user", "content": "More"}]
    assert more["usage"]["prompt_tokens"] == answer(client, whole, max_tokens=1)["usage"]["prompt_tokens"]


def test_a_stream_tells_its_session_with_the_reason(client):
    *_, last = chunks(client, keep_session=True, max_tokens=3)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["session"]["id"].startswith("sess_")


def test_an_uploaded_conversation_goes_on_outside_the_prefix_cache(client, monkeypatch):
    _, session, _ = turn(client, "Hello")
    file = client.get(f"/v1/sessions/{session['id']}/state").content
    media = {"content-type": "application/octet-stream"}
    uploaded = client.post("/v1/sessions", content=file, headers=media).json()
    engine, requests = client.app.state.service.engine, []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda r, after=None: requests.append(r) or submit(r, after))
    _, moved, _ = turn(client, "More", uploaded)
    turn(client, "More", session)
    assert [request.prefix_group for request in requests] == [None, ""]
    assert moved["reused_tokens"] == session["tokens"] - 1


def test_no_session_of_several_answers(client):
    assert "keep_session" in refusal(client, keep_session=True, n=2)["message"]


@pytest.fixture(scope="module")
def hermes(tmp_path_factory):
    """A service of a BPE model with its own template, and the template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = save_tokenizer(folder, "byte level", TOOLS)
    model = small_model(vocab_size=512, bos_token_id=tokenizer.document_start)
    model.directory = folder
    engine = Engine(model, num_slots=4, max_tokens=1024, decode=tokenizer.decode)
    service = Service(engine, tokenizer, "hermes")
    with TestClient(create_app(service), base_url="http://127.0.0.1:8000") as client:
        yield client, find_chat_template(None, tokenizer, folder)


def test_the_models_own_template_and_its_end_of_turn(hermes):
    client, template = hermes
    [end] = [template.tokenizer.special_tokens["<|im_end|>"]]
    assert template.turn_end == end
    [choice] = answer(client, logit_bias={str(end): 100}, max_tokens=5)["choices"]
    assert choice["message"]["content"] == ""
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    body = answer(client, max_tokens=1)
    assert body["usage"]["prompt_tokens"] == len(template.encode(HELLO))


def test_sessions_of_a_bpe_model_go_on_after_tokens_that_its_tokenizer_would_not_choose(hermes):
    """A random model spells words letter by letter; after its end of turn, the template writes a line break."""
    client, template = hermes
    _, session, _ = turn(client, "Hello", temperature=1.5)
    _, moved, _ = turn(client, "More", session, temperature=1.5)
    assert moved["not_reused"] is None
    assert moved["reused_tokens"] >= session["tokens"] - 1
    end = template.tokenizer.special_tokens["<|im_end|>"]
    _, ended, _ = turn(client, "Bye", moved, logit_bias={str(end): 100})
    _, last, _ = turn(client, "Bye", ended)
    assert last["reused_tokens"] >= ended["tokens"] - 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
CONTENT = st.text(max_size=12) | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", "x"])},
    optional={"text": JSON}), max_size=2) | JSON  # fmt: skip
CALLED = st.fixed_dictionaries(
    {
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["f", "g g"]), "arguments": st.text(max_size=4) | JSON}
        )
    },
    optional={"id": JSON, "type": st.just("function")},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"]) | JSON},
    optional={
        "content": CONTENT, "name": JSON, "tool_calls": st.lists(CALLED, max_size=2) | JSON, "tool_call_id": JSON,
        "refusal": JSON, "reasoning_content": JSON, "other": JSON,
    },
)  # fmt: skip
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | JSON, "max_tokens": st.sampled_from([1, 2])},
    optional={
        "tools": st.lists(st.just(TOOL), max_size=2) | JSON, "tool_choice": st.sampled_from(["none", "auto"]) | JSON,
        "stream": st.booleans(), "logprobs": st.booleans() | JSON, "top_logprobs": JSON, "stop": JSON, "n": JSON,
        "continue_final_message": st.booleans(), "add_generation_prompt": st.booleans(),
        "chat_template_kwargs": JSON, "session_id": JSON, "response_format": JSON, "seed": JSON,
    },
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BODY)
def test_no_body_makes_the_server_fail(with_tools, body):
    response = with_tools.post("/v1/chat/completions", json=body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code == 200 and body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in response.text


def test_deep_and_odd_bodies_are_400s(client):
    deep = "[" * 5000 + "]" * 5000
    for text in (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": [{"role": "user", "content": ' + deep + "}]}",
        '{"messages": [{"role": "user", "content": "x"}], "seed": NaN}',
        '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": '
        + "[" * 150
        + "]" * 150
        + "}}",
    ):
        response = client.post("/v1/chat/completions", content=text, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), response.text
    assert answer(client, max_tokens=1)


def test_few_conversations_are_written_at_a_time(client, monkeypatch):
    encode, running, most = ChatTemplate.encode, [], []

    def slow(self, *args, **kwargs):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "encode", slow)
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: post(client, max_tokens=1), range(8)))
    assert {response.status_code for response in responses} == {200}
    assert max(most) == WRITTEN_AT_A_TIME
