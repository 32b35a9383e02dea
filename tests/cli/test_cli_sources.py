"""Sources as every verb meets them: what is read, what is refused by name, and what is left out."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from retnet.data import open_corpus
from tests.cli.command import run, wrong_input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "stdlib", "--limit", 3], "--limit is for --tasks, which is not given"),
        (["--data", "stdlib", "--context", 8, "--stride", 4], "--context, --stride are for --file"),
        (["--data", "stdlib", "--num-fewshot", 0], "--num-fewshot is for --tasks"),
        (["--data", "stdlib", "--include-path", "x"], "--include-path is for --tasks"),
        (["--data", "stdlib", "--part", "all", "--valid-fraction", 0.1], "--part all, which holds nothing out"),
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


def test_text_with_the_syntax_of_a_table_or_json_is_heard_from_every_verb(capsys, byte_model, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text("text,label\na word,1\n" * 9)
    (folder / "b").write_text('{"text": "a"}\n' * 9)
    line = f"warning: {folder}: read as plain text, syntax included: 1 JSON file (b), 1 table file (a.csv); records"
    for words in (
        ["eval", byte_model, "--data", folder, "--part", "all"],
        ["data", "show", folder],
        ["data", folder, tmp_path / "out"],
    ):
        assert run(*words) == 0
        assert line in capsys.readouterr().err


def test_a_file_of_shards_and_an_empty_source_are_refused(capsys, byte_model, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    assert run("data", tmp_path / "a.txt", tmp_path / "tokens") == 0
    for name in ("manifest.json", "00000.json", "00000.tokens", "00000.index"):
        message = f"{name} is a part of token shards; accepted: the whole folder, {tmp_path / 'tokens'}"
        assert message in wrong_input(capsys, "eval", byte_model, "--data", tmp_path / "tokens" / name)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    message = f"state.json is a part of a dataset; accepted: the whole folder, {tmp_path}"
    assert message in wrong_input(capsys, "data", tmp_path / "state.json", tmp_path / "out")
    for words in (["data", "", tmp_path / "out"], ["data", "show", ""], ["eval", byte_model, "--data", ""]):
        assert "a source is empty text; accepted: a file, a folder" in wrong_input(capsys, *words)
    assert "is a folder; accepted: a file of text" in wrong_input(capsys, "eval", byte_model, "--file", tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "c.json", "d.json.gz"])
def test_a_byte_order_mark_and_any_layout_of_objects_give_the_same_records(capsys, tmp_path, name):
    record = json.dumps({"text": "one\r\n\ufefftwo"})
    layouts = {
        "a.jsonl": f"{record}\r\n{record}",
        "a.json": f"{record}\n{record}\n",
        "b.json": f"[{record},\n{record}]",
    }
    layouts |= {"c.json": f"\r{record}\r{record}", "d.json.gz": record.replace(" ", "\n") * 2}
    data = f"\ufeff{layouts[name]}".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert run("data", tmp_path / name, tmp_path / "out", "--field", "text") == 0
    corpus = open_corpus(tmp_path / "out")
    assert [bytes(corpus.tokens(i, 1).tolist()) for i in range(len(corpus))] == ["one\r\n\ufefftwo".encode()] * 2


def test_a_separator_of_zero_bytes_cuts_a_file_that_has_them_early_on(capsys, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\0two\0three")
    assert run("data", tmp_path / "a.txt", tmp_path / "out", "--separator", r"\0") == 0
    assert len(open_corpus(tmp_path / "out")) == 3
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "folder/a.txt")
    assert "1 binary file (a.txt)" in wrong_input(
        capsys, "data", tmp_path / "folder", tmp_path / "out2", "--separator", r"\0"
    )


def test_a_file_name_that_is_not_utf8_is_printed_with_an_escape(capsys, tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    assert run("data", folder, tmp_path / "out") == 0
    assert run("data", "show", tmp_path / "out") == 0
    assert "caf\\udce9/a.txt" in capsys.readouterr().out
