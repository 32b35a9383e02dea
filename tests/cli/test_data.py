"""`retnet data` as a user meets it."""

from __future__ import annotations

import json
from functools import partial

import pytest

from retnet.data import open_corpus
from retnet.system.sizes import format_count
from tests.cli import command

run = partial(command.run, "data")


def wrong_input(capsys, *words):
    return command.wrong_input(capsys, "data", *words)


@pytest.fixture
def tokens(tmp_path, text_folder, capsys):
    assert run(text_folder, tmp_path / "tokens") == 0
    capsys.readouterr()
    return tmp_path / "tokens"


def test_text_becomes_shards_and_the_last_line_counts_them(capsys, tmp_path, text_folder):
    assert run(text_folder, tmp_path / "out") == 0
    line = " ".join(capsys.readouterr().out.split())
    size = sum(path.stat().st_size for path in text_folder.iterdir())
    assert f"out: 30 documents, {format_count(size + 30)} tokens, {size / 1e6:.2f} MB of text in 1 shard" in line
    assert (tmp_path / "out/manifest.json").is_file()


def test_options_reach_the_writer(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("one\t\\two\tthree")
    (tmp_path / "b.jsonl").write_text('{"body": "four", "text": "no"}\n')
    words = ["--separator", r"\t", "--field", "body", "--shard-size", "0.001", "--workers", "1"]
    assert run(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "out", *words) == 0
    capsys.readouterr()
    assert run("show", tmp_path / "out", "--samples", "9", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    samples = sorted((sample["from"], sample["text"]) for sample in facts["samples"])
    assert samples == [("a.txt:1", "\\two"), ("a.txt:1", "one"), ("a.txt:1", "three"), ("b.jsonl:1", "four")]


def test_show_counts_decodes_and_draws(capsys, tokens):
    assert run("show", tokens, "--samples", "2", "--length", "12") == 0
    text = capsys.readouterr().out
    assert "texts/" in text
    assert (tokens / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert run("show", tokens, "--json", "--samples", "30", "--length", "12") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["documents"] == 30
    assert facts["tokens"] == facts["bytes"] + 30
    assert len({sample["document"] for sample in facts["samples"]}) == 30
    assert all(len(sample["text"]) == 11 for sample in facts["samples"])


def test_show_prints_all_of_the_fingerprint_in_a_narrow_terminal(capsys, tokens, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert run("show", tokens) == 0
    assert any(open_corpus(tokens).fingerprint in line for line in capsys.readouterr().out.splitlines())


def test_show_works_where_no_plot_can_be_written(capsys, tokens):
    (tokens / "lengths.png").mkdir()
    assert run("show", tokens) == 0
    printed = capsys.readouterr()
    assert "documents" in printed.out
    assert "texts/" in printed.out
    assert "no plot of the lengths in" in printed.err
    assert run("show", tokens, "--json") == 0
    assert json.loads(capsys.readouterr().out)["plot"] is None
    assert "lengths.png is a directory; accepted: a file" in wrong_input(
        capsys, "show", tokens, "--plot", tokens / "lengths.png"
    )


def test_files_left_out_are_reported_in_one_line(capsys, tmp_path, text_folder):
    assert run(text_folder, tmp_path / "whole") == 0
    assert "left out" not in capsys.readouterr().err
    (text_folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (text_folder / "linked").symlink_to(tmp_path)
    assert run(text_folder, tmp_path / "out") == 0
    found = "left out 1 binary file (image.png), 1 linked folder (linked)"
    assert capsys.readouterr().err.splitlines() == [f"warning: {text_folder}: {found}"]


def test_show_reads_plain_text_and_plots_into_the_given_file(capsys, text_folder, tmp_path):
    assert run("show", text_folder, "--plot", tmp_path / "a.png", "--samples", "0") == 0
    assert f"document lengths plotted in {tmp_path / 'a.png'}" in capsys.readouterr().out
    assert "a.png exists; accepted: another file, or --force" in wrong_input(
        capsys, "show", text_folder, "--plot", tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").is_file()
    assert not (text_folder / "lengths.png").exists()


def test_check_finds_damage_with_exit_code_1(capsys, tokens):
    assert run("check", tokens) == 0
    assert "1 shard, all as written" in " ".join(capsys.readouterr().out.split())
    data = bytearray((tokens / "00000.tokens").read_bytes())
    data[100] ^= 1
    (tokens / "00000.tokens").write_bytes(data)
    assert run("check", tokens) == 1
    assert "00000.tokens is damaged" in " ".join(capsys.readouterr().err.split())


def test_wrong_input_ends_in_one_message(capsys, tmp_path, text_folder):
    assert "one source at least and the folder to write" in wrong_input(capsys, text_folder)
    assert "no such file or folder" in wrong_input(capsys, tmp_path / "gone", tmp_path / "out")
    assert "--separator is empty" in wrong_input(capsys, text_folder, tmp_path / "out", "--separator", "")
    assert "no such tokenizer" in wrong_input(capsys, text_folder, tmp_path / "out", "--tokenizer", tmp_path / "t.json")
    assert "no such file or folder" in wrong_input(capsys, "show", tmp_path / "gone")
    assert "no manifest.json" in wrong_input(capsys, "check", text_folder)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": 3}\n')
    assert "bad.jsonl:3: 'text' is int, not text" in wrong_input(capsys, tmp_path / "bad.jsonl", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "texts"]
