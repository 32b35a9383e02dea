import bz2
import gzip
import os
import re
import shutil

import pytest

from retnet.data import find_documents, split_documents
from retnet.data.sources import SourceWarning


def write(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_a_folder_gives_its_text_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path, {"b.txt": b"bb", "a/z.md": b"z", "a.txt": b"a", "latin1.txt": b"caf\xe9"})
    documents = find_documents(tmp_path)
    assert [d.name for d in documents] == ["a.txt", "a/z.md", "b.txt", "latin1.txt"]
    assert [d.read() for d in documents] == [b"a", b"z", b"bb", b"caf\xe9"]


def test_binary_empty_hidden_and_cached_files_are_skipped(tmp_path):
    write(
        tmp_path,
        {
            "keep": b"text",
            "image": b"\x89PNG\0\0",
            "empty": b"",
            ".hidden": b"text",
            ".git/config": b"text",
            "__pycache__/x.py": b"text",
        },
    )
    assert [d.name for d in find_documents(tmp_path)] == ["keep"]


def test_a_single_file_is_a_source(tmp_path):
    write(tmp_path, {"book.txt": b"once upon a time"})
    (document,) = find_documents(tmp_path / "book.txt")
    assert (document.name, document.size) == ("book.txt", 16)


def test_a_missing_path_is_named_with_what_is_accepted(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no such file or folder: .*nowhere \(accepted: files, folders, 'stdlib'"
    ):
        find_documents(tmp_path / "nowhere")


def test_a_source_without_text_says_which_files_were_seen(tmp_path):
    write(tmp_path, {"image": b"\0\1", "empty": b""})
    with pytest.raises(ValueError, match=r"no text in .*: 1 binary file \(image\), 1 empty file \(empty\)"):
        find_documents(tmp_path)


def test_dangling_links_are_not_documents(tmp_path):
    write(tmp_path, {"keep": b"text"})
    os.symlink(tmp_path / "gone", tmp_path / "dangling")
    assert [d.name for d in find_documents(tmp_path)] == ["keep"]


def test_files_left_out_are_counted(tmp_path):
    write(tmp_path, {"in/a": b"text", "in/b": b"\0", "in/c": "text".encode("utf-16"), "in/d": b"", "other/e": b"text"})
    os.symlink(tmp_path / "gone", tmp_path / "in/dangling")
    os.symlink(tmp_path / "other", tmp_path / "in/linked")
    os.mkfifo(tmp_path / "in/pipe")
    write(tmp_path, {"in/.git/a": b"text", "in/.hidden": b"text", "in/__pycache__/x.pyc": b"code"})
    found = (
        "1 UTF-16 file (c), 1 binary file (b), 1 dangling link (dangling), 1 empty file (d), 1 hidden file (.hidden), "
        "2 hidden folders (.git, __pycache__), 1 linked folder (linked), 1 special file (pipe)"
    )
    with pytest.warns(SourceWarning, match=re.escape(f"in: left out {found}")):
        assert [d.name for d in find_documents(tmp_path / "in")] == ["a"]
    (tmp_path / "in/a").unlink()
    with pytest.raises(ValueError, match=re.escape(f"in: {found}")):
        find_documents(tmp_path / "in")


def test_a_file_in_a_folder_that_cannot_be_listed_is_read(tmp_path, monkeypatch):
    def listdir(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.json").write_text("[1]")
    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.warns(SourceWarning, match="read as plain text, syntax included: 1 JSON file"):
        assert [d.name for d in find_documents(tmp_path / "a.json")] == ["a.json"]


def test_a_warning_names_the_first_files_of_many(tmp_path):
    write(tmp_path, {"a": b"text", **{f"{i}.png": b"\0" for i in range(1200)}})
    with pytest.warns(SourceWarning, match=r"left out 1,200 binary files \(0\.png, 1\.png, 10\.png, \.\.\.\)"):
        find_documents(tmp_path)


def test_a_folder_of_text_alone_gives_no_warning(tmp_path, recwarn):
    write(tmp_path, {"a": b"text", "b/c": b"text"})
    find_documents(tmp_path)
    find_documents("stdlib")
    assert not recwarn.list


NOT_PLAIN = {
    "a.jsonl": (b'{"text": "a"}\n', "1 jsonl file (a.jsonl)"),
    "a.json": (b'{"text": "a"}\n{"text": "b"}\n', "1 jsonl file (a.json)"),
    "a.ndjson": (b"not JSON", "1 jsonl file (a.ndjson)"),
    "b.json": (b'[{"text": "a"}]', "1 json file (b.json)"),
    "a.parquet": (b"PAR1", "1 parquet file (a.parquet)"),
    "a.arrow": (b"\xff\xff\xff\xff", "1 arrow file (a.arrow)"),
    "a.txt.gz": (gzip.compress(b"text", mtime=0), "1 compressed text file (a.txt.gz)"),
    "a.JSON.GZ": (gzip.compress(b'{"text": 1}\n{"text": 2}', mtime=0), "1 compressed jsonl file (a.JSON.GZ)"),
    "a.txt.bz2": (bz2.compress(b"text"), "1 compressed text file (a.txt.bz2)"),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
@pytest.mark.parametrize("beside", [{}, {"README.md": b"text", "sub/x.py": b"code"}])
def test_text_is_not_read_as_what_it_is_not_and_the_error_says_what_was_found(tmp_path, name, beside):
    data, found = NOT_PLAIN[name]
    write(tmp_path, {name: data, **beside})
    found += ", 2 text files (README.md, sub/x.py)" if beside else ""
    accepted = "accepted: token shards, or plain text only (`retnet data"
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds {found}; {accepted}")):
        find_documents(tmp_path)
    if not beside:
        with pytest.raises(ValueError, match=re.escape(f"{name} holds {found}; {accepted}")):
            find_documents(tmp_path / name)


@pytest.mark.parametrize("below", [".", "data", "data/more"])
def test_a_saved_dataset_or_shards_are_found_at_any_depth_and_named(tmp_path, below):
    write(tmp_path, {"a.txt": b"text"})
    folder = tmp_path / below / "saved"
    write(folder, {"state.json": b'{"_data_files": []}', "dataset_info.json": b"{}"})
    for given in (folder, tmp_path):
        with pytest.raises(ValueError, match=rf"holds a? ?dataset (of save_to_disk|in {folder})"):
            find_documents(given)
    shutil.rmtree(folder)
    write(folder, {"00000.tokens": b"\0", "00000.index": b"\0"})  # an interrupted run
    with pytest.raises(ValueError, match=f"holds token shards in {folder}; accepted: {folder} as a source of its own"):
        find_documents(tmp_path)


def test_a_folder_that_cannot_be_read_stops_the_search_as_a_file_does(tmp_path, monkeypatch):
    write(tmp_path, {"a": b"text", "closed/b": b"text"})
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read every folder
    with pytest.raises(PermissionError, match="closed"):
        find_documents(tmp_path)


def test_a_link_to_itself_is_named_alone_and_left_out_of_a_folder(tmp_path):
    write(tmp_path, {"a": b"text"})
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        find_documents(tmp_path / "loop")
    with pytest.warns(SourceWarning, match=r"left out 1 dangling link \(loop\)"):
        assert [d.name for d in find_documents(tmp_path)] == ["a"]


def test_the_standard_library_is_a_source_without_tests_and_packages():
    documents = find_documents("stdlib")
    names = {d.name for d in documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(part in {"test", "site-packages"} for name in names for part in name.split("/"))
    assert sum(d.size for d in documents) > 3_000_000


def test_a_file_that_became_shorter_is_named_when_it_is_read(tmp_path):
    write(tmp_path, {"log.txt": b"0123456789"})
    (document,) = find_documents(tmp_path)
    (tmp_path / "log.txt").write_bytes(b"012")
    with pytest.raises(ValueError, match=r"log\.txt changed while in use: 10 bytes expected"):
        document.read()


def test_every_document_is_on_one_side_whatever_other_documents_there_are(tmp_path):
    write(tmp_path, {f"{i}.txt": b"x" * 10 for i in range(200)})
    documents = find_documents(tmp_path)
    split = split_documents(documents, 0.1)
    assert sorted(split.train + split.valid, key=lambda d: d.name) == list(documents)
    assert 5 <= len(split.valid) <= 40
    without_some = split_documents(documents[::2], 0.1)
    assert set(without_some.valid) == set(split.valid) & set(documents[::2])


def test_one_file_is_split_at_its_end(tmp_path):
    write(tmp_path, {"book.txt": bytes(range(1, 101))})
    split = split_documents(find_documents(tmp_path), 0.05)
    assert [d.read() for d in split.train] == [bytes(range(1, 96))]
    assert [d.read() for d in split.valid] == [bytes(range(96, 101))]


def test_too_little_text_to_split_is_an_error(tmp_path):
    write(tmp_path, {"a": b"x"})
    with pytest.raises(ValueError, match=r"too little text .*: 1 bytes"):
        split_documents(find_documents(tmp_path))


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_documents([], fraction)
