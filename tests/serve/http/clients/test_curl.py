"""curl, as in the documentation."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")]
JSON = ["-H", "Content-Type: application/json"]


def curl(*words: str) -> str:
    return subprocess.run(["curl", "-sS", *words], check=True, capture_output=True, text=True, timeout=60).stdout


def test_a_completion(url):
    answer = json.loads(curl(f"{url}/v1/completions", *JSON, "-d", '{"prompt": "The river", "max_tokens": 7}'))
    assert answer["usage"]["completion_tokens"] == 7


def test_a_stream_arrives_event_by_event(url):
    body = '{"prompt": "The river", "max_tokens": 20, "stream": true}'
    *events, done, rest = curl("-N", f"{url}/v1/completions", *JSON, "-d", body).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_a_constrained_chat(url):
    body = {
        "messages": [{"role": "user", "content": "Yes or no?"}],
        "structured_outputs": {"choice": ["yes", "no"]},
    }
    answer = json.loads(curl(f"{url}/v1/chat/completions", *JSON, "-d", json.dumps(body)))
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")


def test_a_body_that_is_no_json_is_refused(url):
    answer = json.loads(curl(f"{url}/v1/completions", "-d", '{"prompt": "a"}'))
    assert "application/json" in answer["error"]["message"]
