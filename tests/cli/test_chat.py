"""`retnet chat` as users start it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import subprocess
import sys
import termios
import time

import pytest

from tests.cli.command import run, wrong_input
from tests.paths import ROOT
from tests.serve.http.server import live_server


def typed(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_a_model_answers_lines_of_a_pipe_and_goes_on_with_a_file(monkeypatch, capsys, tmp_path):
    file = tmp_path / "talk"
    typed(monkeypatch, f"Hello\n/save {file}\n")
    options = ("--max-tokens", 5, "--seed", 1, "--device", "cpu")
    assert run("chat", "retnet-tiny", *options) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "> " not in out
    assert str(file) in err
    typed(monkeypatch, "More\n/stats\n")
    assert run("chat", "retnet-tiny", "--load", file, *options) == 0
    assert "4 messages" in capsys.readouterr().err


def test_a_server_answers_lines_of_a_pipe(monkeypatch, capsys):
    with live_server() as server:
        typed(monkeypatch, "Hello\nMore\n/stats\n")
        assert run("chat", server.url, "--max-tokens", 5, "--seed", 1, "--system", "Be brief.") == 0
        assert f"5 messages, answered by tiny at {server.url}" in capsys.readouterr().err
        assert server.service.num_streams == 0


def test_what_is_wrong_with_the_command_line_is_said(capsys, tmp_path):
    assert "no model 'nowhere'" in wrong_input(capsys, "chat", "nowhere")
    assert "no answer from http://127.0.0.1:1" in wrong_input(capsys, "chat", "http://127.0.0.1:1")
    assert "a chat needs one" in wrong_input(capsys, "chat", "retnet-tiny", "--chat-template", "none")
    assert "temperature" in wrong_input(capsys, "chat", "retnet-tiny", "--temperature", -1)
    keys = tmp_path / "keys"
    keys.write_text("a:b\nc:d\n")
    assert "one API key" in wrong_input(capsys, "chat", "http://127.0.0.1:1", "--api-key-file", keys)
    assert "no snapshot" in wrong_input(capsys, "chat", "retnet-tiny", "--load", tmp_path / "none")


@pytest.mark.slow
def test_the_program_at_a_terminal_of_its_own(tmp_path):
    """A typed Ctrl-C comes from the terminal: it stops the answer, and the program goes on."""
    master, slave = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "retnet.cli", "chat", "retnet-tiny", "--device", "cpu", "--max-tokens", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    program = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal, env=environment, cwd=tmp_path
    )
    os.close(slave)
    shown = ""

    def wait_for(text: str, after: int) -> int:
        nonlocal shown
        until = time.monotonic() + 60
        while (found := shown.find(text, after)) < 0:
            assert time.monotonic() < until, f"no {text!r} in {shown!r}"
            shown += os.read(master, 4096).decode(errors="replace")
        return found + len(text)

    try:
        place = wait_for("> ", 0)
        os.write(master, b"Hello\n")
        place = wait_for("Hello", place)
        time.sleep(0.5)  # an endless answer runs
        os.write(master, b"\x03")
        place = wait_for("; stopped", place)
        place = wait_for("> ", place)
        os.write(master, b"/stats\n")
        place = wait_for("2 messages", place)
        place = wait_for("> ", place)
        os.write(master, b"\x04")
        assert program.wait(30) == 0
    finally:
        program.kill()
        program.wait()
        os.close(master)
