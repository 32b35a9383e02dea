"""A model that `retnet train` teaches conversations answers over HTTP, through `retnet serve`, as it was taught."""

from __future__ import annotations

import json

import httpx
import pytest

from retnet.data.chat_template import find_chat_template
from retnet.data.tokenizer import ByteTokenizer
from tests.cli.command import run
from tests.cli.test_serve import process

pytestmark = pytest.mark.slow
TAUGHT = {"What decays?": "The state.", "Who agrees?": "The three forms.", "Which form trains?": "The parallel form."}
HELD_OUT = {"What is read once?": "A token."}  # the split leaves this text for validation


def test_a_trained_chat_model_answers_over_http_as_it_was_taught(tmp_path):
    chats, model = tmp_path / "chats.jsonl", tmp_path / "chat"
    with chats.open("w") as file:
        for question, answer in list((TAUGHT | HELD_OUT).items()) * 60:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    settings = {
        "length": 128,
        "max_steps": 90,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 2,
        "num_samples": 0,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    assert run("train", "model=retnet-tiny", f"data={chats}", f"output_dir={model}", *words) == 0
    log = json.loads((model / "training.json").read_text())["log"]
    assert min(entry["loss"] for entry in log if "loss" in entry) < 0.1

    with process(model) as (_, url):
        for question, answer in TAUGHT.items():
            asked = {"model": "chat", "messages": [{"role": "user", "content": question}], "temperature": 0}
            reply = httpx.post(f"{url}/v1/chat/completions", json=asked | {"max_tokens": 40}, timeout=60).json()
            choice = reply["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")
            prompt = find_chat_template(None, ByteTokenizer(), model).encode(asked["messages"])
            assert reply["usage"]["prompt_tokens"] == len(prompt)
