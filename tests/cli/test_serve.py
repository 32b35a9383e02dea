"""`retnet serve` as a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from retnet.serve.http.run import bound_socket
from retnet.system.extras import LIBRARIES
from tests.cli.command import wrong_input
from tests.paths import ROOT

DOCS = (ROOT / "docs/do/serve.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, and there are no API keys; accepted: "),
        (["--host", "192.0.2.1"], "or --allow-public to serve everyone"),
        (["--slots", 4, "--memory", "1GiB"], "--slots and --memory are both given"),
        (["--memory", "much"], "--memory: the size is 'much'"),
        (["--max-body", "0"], "--max-body is 0; accepted: at least 1 byte"),
        (["--slots", 5], "1 or a multiple of 4"),
        (["--api-key-file", "none/there"], "No such file or directory: none/there"),
        (["--state", "a=x", "--state", "a=y"], "--state has two files for 'a'; accepted: one FILE for all requests"),
        (["--state", "x", "--state", "y"], "--state has two files for 'retnet-tiny'"),
        (["--state", "=x"], "--state is '=x'; accepted: FILE, or NAME=FILE"),
        (["--state", "a=none/there"], "no snapshot at none/there: no such file"),
        (["--device", "tpu"], "accepted: auto, cpu, cuda"),
    ],
)
def test_wrong_options_are_one_message(capsys, words, message):
    assert message in wrong_input(capsys, "serve", "retnet-tiny", "--port", 0, *words)


def test_a_model_that_is_not_there_is_one_message(capsys):
    assert "no model 'none'" in wrong_input(capsys, "serve", "none", "--port", 0)


def test_a_port_that_is_taken_is_told_before_the_model_is_looked_for(capsys):
    with closing(bound_socket("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port})" in wrong_input(capsys, "serve", "none", "--port", port)


@pytest.mark.parametrize("package", LIBRARIES["serve"])
def test_without_the_extra_the_message_names_it(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = wrong_input(capsys, "serve", "none")
    assert f"retnet serve needs {package}, which is not installed" in message
    assert "install -e '" in message
    assert "[serve]'" in message


def test_every_option_is_in_the_docs():
    import typer

    from retnet.cli import app

    command = typer.main.get_command(app).commands["serve"]
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
    assert len(options) > 25
    assert [name for name in options if f"`{name}" not in DOCS] == []


@contextmanager
def process(model: Path, *words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a process, and its address."""
    with closing(bound_socket("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "retnet.cli", "serve", str(model), "--port", str(port), *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    served = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}, **pipes)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if served.poll() is not None:
                break
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield served, url
    finally:
        served.kill()
        served.wait()


@pytest.mark.slow
def test_the_banner_says_where_what_it_costs_and_a_curl_that_works(byte_model):
    with process(byte_model) as (served, url):
        response = httpx.post(
            f"{url}/v1/completions", json={"model": "byte-model", "prompt": "x", "max_tokens": 3, "ignore_eos": True}
        )
        assert response.json()["usage"]["completion_tokens"] == 3
        served.send_signal(signal.SIGTERM)
        output, log = served.communicate(timeout=60)
    assert served.returncode == 0
    assert "serves byte-model: " in output
    assert url in output
    assert "of state per stream at any length; a Transformer's KV cache" in output
    assert f"retnet chat {url}" in output
    (curl,) = (line for line in output.splitlines() if line.startswith("curl "))
    assert f"{url}/v1/completions" in curl
    lines = [json.loads(line) for line in log.splitlines()]
    assert any(line.get("route") == "/v1/completions" and line["status"] == 200 for line in lines)


@pytest.mark.slow
def test_a_second_signal_exits_at_once(byte_model):
    with process(byte_model, "--grace", 600, "--quiet") as (served, url):
        body = {"model": "byte-model", "prompt": "x", "max_tokens": 16000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()  # kept, because dropping it closes the connection
            next(lines)
            served.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert served.poll() is None
            served.send_signal(signal.SIGTERM)
            assert served.wait(10) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_keys_are_needed_where_there_is_a_file_of_them(byte_model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("alice:alice-0123456789abcdef\n")
    keys.chmod(0o600)
    with process(byte_model, "--api-key-file", keys, "--host", "0.0.0.0") as (served, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"authorization": "Bearer alice-0123456789abcdef"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        served.send_signal(signal.SIGINT)
        output, log = served.communicate(timeout=60)
    assert served.returncode == 0
    assert "YOUR_KEY" in output
    assert "0123456789abcdef" not in output + log


@pytest.mark.slow
def test_a_quiet_server_on_a_free_port_prints_its_address_alone(byte_model):
    command = [sys.executable, "-m", "retnet.cli", "serve", str(byte_model), "--quiet", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        url = served.stdout.readline().strip()
        assert httpx.get(f"{url}/ready").status_code == 200
        served.send_signal(signal.SIGTERM)
        assert served.communicate(timeout=60)[0] == ""
