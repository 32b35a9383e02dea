import os
from collections import Counter

import pytest

from retnet.data import find_documents, split_documents
from retnet.data.sources import describe_left_out


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
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere.*a file, a folder, or 'stdlib'"):
        find_documents(tmp_path / "nowhere")


def test_a_source_without_text_says_which_files_were_seen(tmp_path):
    write(tmp_path, {"image": b"\0\1", "empty": b""})
    with pytest.raises(ValueError, match="2 files seen, 1 empty, 1 binary"):
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
    left_out = Counter({"empty file": 1})
    assert [d.name for d in find_documents(tmp_path / "in", left_out=left_out)] == ["a"]
    assert describe_left_out(left_out) == (
        "2 binary files, 1 dangling link, 2 empty files, 1 linked folder, 1 special file"
    )
    (tmp_path / "in/a").unlink()
    with pytest.raises(ValueError, match="3 files seen, 1 empty, 2 binary, and 1 dangling link, 1 linked folder, 1 sp"):
        find_documents(tmp_path / "in")


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
