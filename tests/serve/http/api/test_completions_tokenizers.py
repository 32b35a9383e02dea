"""Completions of models with trained tokenizers."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from retnet.serve.engine import Engine
from retnet.serve.http.app import create_app
from retnet.serve.http.service import Service
from tests.serve.http.chat.models import MAKERS, save_tokenizer
from tests.small_models import small_model


@pytest.mark.parametrize("kind", MAKERS)
def test_prompt_and_completion_are_one_text(kind, tmp_path):
    """The text of a prompt, its completion and what a session adds, whole or streamed, is that of all tokens."""
    tokenizer = save_tokenizer(tmp_path, kind, None)
    model = small_model(vocab_size=tokenizer.vocab_size + 3, eos_token_id=tokenizer.document_end)  # a padded vocabulary
    engine = Engine(model, num_slots=4, decode=tokenizer.decode)
    generations, submit = [], engine.submit

    def recorded(*arguments):
        generations.append(submit(*arguments))
        return generations[-1]

    engine.submit = recorded
    with TestClient(create_app(Service(engine, tokenizer, "tiny")), base_url="http://127.0.0.1:8000") as client:
        for seed in range(4):
            body = {"prompt": "the river how", "seed": seed, "max_tokens": 12, "echo": True, "ignore_eos": True}
            whole = client.post("/v1/completions", json=body | {"keep_session": True}).json()
            text = whole["choices"][0]["text"]
            assert text == tokenizer.decode(generations[-1].seen)
            assert whole["usage"]["completion_tokens"] == 12
            more = {"prompt": "", "max_tokens": 6, "seed": seed, "session_id": whole["session"]["id"], "stream": True}
            events = client.post("/v1/completions", json=more | {"ignore_eos": True}).text.split("\n\n")[:-2]
            added = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
            if not text.endswith("\ufffd"):
                assert text + added == tokenizer.decode(generations[-1].seen)
            [choice] = client.post("/v1/completions", json=body | {"logprobs": 2, "echo": False}).json()["choices"]
            assert len(choice["logprobs"]["tokens"]) == 12
            assert choice["logprobs"]["text_offset"] == sorted(choice["logprobs"]["text_offset"])
            assert "the river how" + choice["text"] == text


@pytest.mark.parametrize("own_end", [True, False])
def test_an_end_token_ends_the_text_unless_it_is_ignored(own_end, tmp_path):
    """That of the tokenizer, also for a model that names none. It has no text, and is not the request's own stop."""
    tokenizer = save_tokenizer(tmp_path, "byte level", None)
    end = tokenizer.document_end
    model = small_model(vocab_size=tokenizer.vocab_size, **({"eos_token_id": end} if own_end else {}))
    service = Service(Engine(model, num_slots=1, decode=tokenizer.decode), tokenizer, "tiny")
    with TestClient(create_app(service), base_url="http://127.0.0.1:8000") as client:
        body = {"prompt": "the river", "logit_bias": {str(end): 100}, "max_tokens": 5, "logprobs": 0}
        [choice] = client.post("/v1/completions", json=body).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
        assert choice["logprobs"]["tokens"] == [""]
        [choice] = client.post("/v1/completions", json=body | {"ignore_eos": True}).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "length")
        assert choice["logprobs"]["tokens"] == ["</s>"] * 5
