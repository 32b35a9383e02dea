from __future__ import annotations

import pytest
from pydantic import ValidationError

from retnet.serve.http.chat.messages import Message
from retnet.serve.http.errors import ApiError


def read(**fields) -> dict:
    return Message.model_validate(fields).for_template()


def test_texts_of_all_forms():
    assert read(role="user", content="hi") == {"role": "user", "content": "hi"}
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    assert read(role="user", content=parts, name="Ann") == {"role": "user", "content": "a\nb\nc", "name": "Ann"}
    assert read(role="developer", content="x") == {"role": "system", "content": "x"}
    assert read(role="user", content="") == {"role": "user", "content": ""}
    assert read(role="user", content=[]) == {"role": "user", "content": ""}


def test_messages_of_the_assistant_as_clients_send_them_back():
    call = {"id": "c1", "index": 0, "type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2.5]}'}}
    fields = {"content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None}
    assert read(role="assistant", tool_calls=[call], **fields) == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, 2.5]}}}],
    }
    assert read(role="assistant", refusal="no")["content"] == "no"
    assert read(role="tool", content="3", tool_call_id="c1")["tool_call_id"] == "c1"
    assert read(role="assistant", content="x", reasoning_content="hm")["reasoning_content"] == "hm"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_media_are_refused_by_name(kind):
    with pytest.raises(ApiError, match=f"content of type {kind} is not honoured: the model reads text"):
        read(role="user", content=[{"type": "text", "text": "x"}, {"type": kind, kind: {"url": "http://x"}}])


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "user"},
        {"role": "assistant"},
        {"role": "user", "content": "x", "tool_calls": []},
        {"role": "user", "content": "x", "tool_call_id": "c"},
        {"role": "system", "content": "x", "reasoning_content": "y"},
        {"role": "user", "content": "x", "function_call": {"name": "f"}},
        {"role": "user", "content": "x", "audio": {"id": "a"}},
        {"role": "user", "content": "x", "colour": "red"},
    ],
)
def test_fields_that_do_not_fit_the_role_are_refused(fields):
    with pytest.raises(ApiError) as refused:
        read(**fields)
    assert refused.value.status == 400
    assert "Traceback" not in refused.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "x"},
        {"role": "function", "content": "x"},
        {"role": "<|im_start|>", "content": "x"},
        {"role": "user", "content": 1},
        {"role": "user", "content": {"type": "text"}},
        {"role": "user", "content": [1]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": ["text"], "text": "x"}]},
        {"role": "user", "content": "x", "name": "n" * 300},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": NaN}'}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 9999}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1e999}'}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": ' + "9" * 5000 + "}"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f g", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f\n", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f", "arguments": "{}"}}]},
    ],
)
def test_malformed_messages_are_not_valid(fields):
    with pytest.raises(ValidationError):
        read(**fields)
