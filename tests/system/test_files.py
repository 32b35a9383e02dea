"""Atomic files: whole or not there."""

import os
import sys

import pytest

from retnet.system import files
from retnet.system.files import flush, move_into_place, read_json, write_json, written_whole


def test_a_file_takes_its_name_only_when_it_is_complete(tmp_path):
    with written_whole(tmp_path / "a") as file:
        file.write(b"whole")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_after_an_exception_the_old_file_is_there_and_nothing_else(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write_half():
        with written_whole(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_two_writers_of_one_path_do_not_share_a_temporary_file(tmp_path):
    with written_whole(tmp_path / "a") as first, written_whole(tmp_path / "a") as second:
        first.write(b"first")
        second.write(b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]  # the last to finish


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, "flush", lambda path: done.append(path.name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    (tmp_path / "new").write_text("new")
    move_into_place(tmp_path / "new", tmp_path / "a")
    assert done == ["new", "rename", tmp_path.name]


def test_a_flush_reaches_the_disk_for_files_and_folders(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    (tmp_path / "a").touch()
    flush(tmp_path / "a")
    flush(tmp_path)
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_windows_flushes_files_and_skips_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    with written_whole(tmp_path / "a") as file:
        file.write(b"whole")
    assert synced == [(tmp_path / "a").stat().st_ino]


def test_json_keeps_names_that_are_not_unicode(tmp_path):
    name = "é" + b"\xff".decode("utf-8", "surrogateescape")
    write_json(tmp_path / "a.json", {"name": name})
    assert "é" in (tmp_path / "a.json").read_text("utf-8"), "valid UTF-8, and letters as they are"
    assert read_json(tmp_path / "a.json") == {"name": name}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is a JSON list; accepted: an object"),
        ("{cut", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_json_that_is_no_object_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"a\.json {message}"):
        files.read_json(tmp_path / "a.json")


def test_json_is_read_as_it_was_written(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1, "\u00e9"]})
    assert files.read_json(tmp_path / "a.json") == {"a": [1, "\u00e9"]}
