"""The tables of docs/serve.md list what the server takes, and its curl examples run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from retnet.serve.http.completions import CompletionBody
from retnet.serve.http.fields import MAX_BIASES, MAX_CHOICES, MAX_STOP_LENGTH, MAX_STOPS, SEED_STEP
from tests.paths import ROOT
from tests.serve.http.server import live_server

PAGE = (ROOT / "docs" / "serve.md").read_text()
REQUESTS = PAGE[PAGE.index("## Requests") : PAGE.index("## Sessions")]


def test_every_field_is_in_the_table_and_no_other():
    table = REQUESTS[REQUESTS.index("### Fields") : REQUESTS.index("### Sampling")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(CompletionBody.model_fields)
    for limit in (MAX_CHOICES, MAX_BIASES, MAX_STOPS, MAX_STOP_LENGTH):
        assert re.search(rf"\b{limit}\b", table)
    assert hex(SEED_STEP) in table


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_example_of_a_request_runs():
    blocks = re.findall(r"```bash\n(.*?)```", REQUESTS, re.DOTALL)
    commands = [c for block in blocks for c in re.findall(r"^curl .*?[^\\]$", block, re.DOTALL | re.MULTILINE)]
    assert len(commands) == 4
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
