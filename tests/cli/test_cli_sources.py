"""Sources as every verb meets them: what is read, what is refused by name, and what is left out."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from retnet.cli import main


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return int(done.value.code or 0)


def wrong_input(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command line that has to be refused."""
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "stdlib", "--limit", 3], "--limit is for --tasks, which is not given"),
        (["--data", "stdlib", "--context", 8, "--stride", 4], "--context, --stride are for --file"),
        (["--data", "stdlib", "--num-fewshot", 0], "--num-fewshot is for --tasks"),
        (["--data", "stdlib", "--include-path", "x"], "--include-path is for --tasks"),
        (["--data", "stdlib", "--part", "all", "--valid-fraction", 0.1], "--part all holds nothing out"),
        (["--file", "x", "--part", "valid"], "--part is for --data"),
        (["--file", "x", "--valid-fraction", 0.05, "--limit", 1], "--valid-fraction is for --data"),
        (["--tasks", "x", "--stride", 3], "--stride is for --file"),
    ],
)
def test_eval_refuses_options_that_have_no_effect(capsys, byte_model, words, message):
    assert message in wrong_input(capsys, "eval", byte_model, *words)


@pytest.mark.parametrize("text", ["one\r\ntwo\r\n\r\nthree\r", "\ufeffone\ntwo", "a\x0b\x85\u2028b" + "x" * 200])
def test_eval_scores_the_same_text_from_a_file_and_from_data(capsys, byte_model, tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert run("eval", byte_model, "--file", tmp_path / "a.txt", "--json") == 0
    of_file = json.loads(capsys.readouterr().out)["stateful"]
    assert run("eval", byte_model, "--data", tmp_path / "a.txt", "--part", "all", "--json") == 0
    of_data = json.loads(capsys.readouterr().out)
    assert of_file["tokens"] == of_data["bytes"] == (tmp_path / "a.txt").stat().st_size
    assert of_file["bits_per_byte"] == pytest.approx(of_data["bits_per_byte"][str(byte_model)], rel=1e-5)


def test_eval_scores_shards_as_the_text_that_they_were_written_from(capsys, byte_model, tmp_path):
    text_folder = tmp_path / "texts"
    text_folder.mkdir()
    for name in "ab":
        (text_folder / name).write_text(f"text of {name}\r\n" * 9)
    assert run("data", text_folder, tmp_path / "parent/tokens") == 0
    capsys.readouterr()
    bits = {}
    for data in (text_folder, tmp_path / "parent/tokens"):
        assert run("eval", byte_model, "--data", data, "--part", "all", "--json") == 0
        bits[data] = json.loads(capsys.readouterr().out)["bits_per_byte"]
    of_text, of_shards = bits.values()
    assert of_shards == pytest.approx(of_text, rel=1e-5)
    message = f"holds token shards in {tmp_path / 'parent/tokens'}"
    assert message in wrong_input(capsys, "eval", byte_model, "--data", tmp_path / "parent")
    (tmp_path / "parent/tokens/manifest.json").unlink()
    assert "no manifest.json" in wrong_input(capsys, "eval", byte_model, "--data", tmp_path / "parent/tokens")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt.gz", "a.parquet"])
def test_every_verb_refuses_text_that_is_something_else_and_says_what_it_found(capsys, byte_model, tmp_path, name):
    data = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "README.md").write_text("about")
    kind = {"a.txt.gz": "compressed text", "a.parquet": "parquet"}.get(name, "jsonl")
    for words in (
        ["train", f"data={tmp_path}", "model=retnet-tiny"],
        ["train", f"data={tmp_path / name}", "model=retnet-tiny"],
        ["eval", byte_model, "--data", tmp_path],
        ["eval", byte_model, "--file", tmp_path / name],
        ["data", "show", tmp_path / name],
    ):
        message = wrong_input(capsys, *words)
        assert f"1 {kind} file ({name})" in message
        assert "accepted: token shards, or plain text only" in message


def test_files_left_out_are_heard_from_every_verb(capsys, byte_model, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 20)
    (tmp_path / "b.bin").write_bytes(b"\0")
    line = f"warning: {tmp_path}: left out 1 binary file (b.bin)"
    for words in (
        ["eval", byte_model, "--data", tmp_path],
        ["data", "show", tmp_path],
        ["data", tmp_path, tmp_path.with_name("out")],
    ):
        assert run(*words) == 0
        assert line in capsys.readouterr().err.splitlines()


def test_a_file_name_that_is_not_utf8_is_printed_with_an_escape(capsys, tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    assert run("data", folder, tmp_path / "out") == 0
    assert run("data", "show", tmp_path / "out") == 0
    assert "caf\\udce9/a.txt" in capsys.readouterr().out
