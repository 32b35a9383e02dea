"""The tables of docs/do/serve.md list what the server takes, and its curl examples run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from retnet.cli.chat_terminal import HELP
from retnet.data.chat_template import find_chat_template
from retnet.data.tokenizer import ByteTokenizer
from retnet.serve.http.api.completions import CompletionBody
from retnet.serve.http.api.fields import MAX_BIASES, MAX_CHOICES, MAX_STOP_LENGTH, MAX_STOPS, SEED_STEP, SamplingFields
from retnet.serve.http.chat.messages import MAX_MESSAGES
from retnet.serve.http.chat.routes import MAX_OPTIONS, ChatBody
from retnet.serve.http.chat.tools import MAX_TOOLS
from tests.paths import ROOT
from tests.serve.http.server import live_server

PAGE = (ROOT / "docs/do/serve.md").read_text()
REQUESTS = PAGE[PAGE.index("## Requests") : PAGE.index("## Chats")]
CHATS = PAGE[PAGE.index("## Chats") : PAGE.index("## In a terminal")]


def test_every_field_is_in_the_table_and_no_other():
    table = REQUESTS[REQUESTS.index("### Fields") : REQUESTS.index("### Sampling")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(CompletionBody.model_fields)
    for limit in (MAX_CHOICES, MAX_BIASES, MAX_STOPS, MAX_STOP_LENGTH):
        assert re.search(rf"\b{limit}\b", table)
    assert hex(SEED_STEP) in table


def test_every_field_of_a_chat_is_in_its_table_and_no_other():
    table = CHATS[: CHATS.index("### Messages")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(set(ChatBody.model_fields) - set(SamplingFields.model_fields))
    for limit in (MAX_MESSAGES, MAX_TOOLS, MAX_OPTIONS):
        assert re.search(rf"\b{limit}\b", table)


def test_the_plain_template_is_the_one_of_the_page():
    template = find_chat_template("plain", ByteTokenizer(), None)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = bytes(template.encode(messages)[1:]).decode()
    assert f"```\n{text}```\n" in CHATS
    assert all(json.dumps(stop)[1:-1] in CHATS for stop in template.stops)


def test_every_command_of_a_terminal_is_in_its_table():
    table = PAGE[PAGE.index("## In a terminal") : PAGE.index("## Sessions\n")]
    listed = set(re.findall(r"^(/\w+)", HELP, re.MULTILINE))
    assert set(re.findall(r"`(/\w+)[ `]", table)) == listed


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_example_of_a_request_runs():
    blocks = re.findall(r"```bash\n(.*?)```", REQUESTS + CHATS, re.DOTALL)
    commands = [c for block in blocks for c in re.findall(r"^curl .*?[^\\]$", block, re.DOTALL | re.MULTILINE)]
    assert len(commands) == 6
    with live_server() as server:
        for command in commands:
            command = command.replace("localhost:8000", f"127.0.0.1:{server.port}")
            done = subprocess.run(
                ["sh", "-c", command + " --fail-with-body"], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stdout
            if done.stdout.startswith("data: "):
                assert done.stdout.endswith("data: [DONE]\n\n")
            else:
                assert json.loads(done.stdout)["choices"]
