import bz2
import gzip
import json
import lzma

import pytest

from retnet.data.compression import DamagedError
from retnet.data.kinds import Kind, kind_of_file, kind_of_folder, syntax_of

RECORD = b'{"text": "a", "id": 1}\n'
JSON_FILES = {
    "lines": (RECORD * 2, Kind.JSONL),
    "one line with the field": (RECORD, Kind.JSONL),
    "a blank line first": (b"\n\n" + RECORD * 2, Kind.JSONL),
    "lines without the field": (b'{"a": 1}\n{"b": 2}\n', Kind.JSONL),
    "a damaged second line": (RECORD + b'{"text": "b\n', Kind.JSONL),
    "a damaged first line": (b'{"text": "b\n' + RECORD, Kind.JSONL),
    "a zero byte in a line": (RECORD + b'{"text": "\0"}\n', Kind.JSONL),
    "a byte order mark": (b"\xef\xbb\xbf" + RECORD * 2, Kind.JSONL),
    "a long first line": (json.dumps({"text": "x" * 100_000}).encode() + b"\n" + RECORD, Kind.JSONL),
    "an array of records": (b"[" + RECORD + b", " + RECORD + b"]", Kind.JSON),
    "an indented array": (json.dumps([{"text": "a"}] * 3, indent=2).encode(), Kind.JSON),
    "an array whose first record is long": (json.dumps([{"text": "x" * 300_000}] * 2).encode(), Kind.JSON),
    "settings on one line": (b'{"name": "x"}\n', Kind.TEXT),
    "settings on lines": (json.dumps({"name": "x", "list": [{"a": 1}]}, indent=1).encode(), Kind.TEXT),
    "an array of other objects": (b'[{"a": 1}, {"a": 2}]', Kind.TEXT),
    "an array of numbers": (b"[1, 2]", Kind.TEXT),
    "objects on several lines": (json.dumps({"text": "a"}, indent=1).encode() * 2, Kind.JSON),
    "objects on one line": (RECORD.strip() * 2, Kind.JSON),
    "lines of old Macs": (RECORD.replace(b"\n", b"\r") * 2, Kind.JSON),
    "indented lines": ((b" " + RECORD) * 2, Kind.JSON),
    "one object on several lines": (json.dumps({"id": 1, "text": "a"}, indent=1).encode(), Kind.JSON),
    "an array cut inside its first record": (b'[{"id": 1, "text": "a', Kind.JSON),
    "a damaged record on several lines": (b'{"id": 1\n "text": "a"}', Kind.JSON),
    "damaged settings": (b'{"text": {"a": 1}, // a comment\n}\n', Kind.TEXT),
    "settings of a text": (json.dumps({"text": {"size": 1}}, indent=1).encode(), Kind.TEXT),
    "not JSON": (b"// settings\n{\n}\n", Kind.TEXT),
    "a number": (b"1", Kind.TEXT),
    "UTF-16": (RECORD.decode().encode("utf-16"), Kind.UTF16),
}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".JSON.xz"])
def test_a_json_file_is_records_or_text_by_its_first_lines(tmp_path, name, suffix):
    data, kind = JSON_FILES[name]
    compress = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix[-2:], bytes)
    (tmp_path / f"a{suffix}").write_bytes(compress(data))
    assert kind_of_file(tmp_path / f"a{suffix}") is kind


def test_utf16_without_zero_bytes_and_words_that_begin_as_bzip2_are_told_apart(tmp_path):
    for encoding, order in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        (tmp_path / "a.txt").write_bytes(order + ("\u4e2d\u6587" * 50).encode(encoding))
        assert kind_of_file(tmp_path / "a.txt") is Kind.UTF16
    (tmp_path / "a.txt").write_bytes(b"BZhang wrote this")
    assert kind_of_file(tmp_path / "a.txt") is Kind.TEXT
    (tmp_path / "a.txt").write_bytes(bz2.compress(b""))
    assert kind_of_file(tmp_path / "a.txt") is Kind.BINARY


@pytest.mark.parametrize(
    ("name", "data", "syntax"),
    [
        ("a.csv", b"text,label\n", "table"),
        ("a.TSV.gz", gzip.compress(b"text\n", mtime=0), "table"),
        ("a.json", b"[null]", "JSON"),
        ("part-00000", RECORD * 2, "JSON"),
        ("a.txt.gz", gzip.compress(b"\xef\xbb\xbf" + RECORD, mtime=0), "JSON"),
        ("a.txt", b' [{ "text" : 1}]', "JSON"),
        ("a.txt", b"{}, a pair of braces", None),
        ("a.c", b"{ int x; }", None),
        ("a.txt", b'["quoted"] {', None),
    ],
)
def test_the_syntax_of_a_file_of_text_is_known(tmp_path, name, data, syntax):
    (tmp_path / name).write_bytes(data)
    assert syntax_of(tmp_path / name) == syntax


def test_the_field_decides_about_one_object(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"body": "x"}')
    (tmp_path / "b.json").write_bytes(b'[{"body": "x"}]')
    for name, of_body, of_other in (("a.json", Kind.JSONL, Kind.TEXT), ("b.json", Kind.JSON, Kind.JSON)):
        kinds = [kind_of_file(tmp_path / name, field) for field in (None, "body", "other")]
        assert kinds == [Kind.TEXT, of_body, of_other]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.bz2"])
@pytest.mark.parametrize("data", [b"\0" * 9, b'{"text": "\0"}', b"PK\3\4", b"text"])
def test_a_file_whose_name_says_json_lines_is_that_whatever_it_holds(tmp_path, name, data):
    (tmp_path / name).write_bytes(bz2.compress(data) if name.endswith("bz2") else data)
    assert kind_of_file(tmp_path / name) is Kind.JSONL


@pytest.mark.parametrize(
    "data",
    [b"a\0b", gzip.compress(b"x", mtime=0), bz2.compress(b"x" * 99), lzma.compress(b"x"), b"PK\3\4 zip", b"%PDF-1.4 x"],
)
def test_compressed_files_under_other_names_are_binary(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    assert [kind_of_file(tmp_path / name) for name in ("a.txt", "b.txt.gz")] == [Kind.BINARY] * 2


@pytest.mark.parametrize("name", ["a.txt.gz", "a.json.zst", "a.jsonl.xz", "a.bz2"])
def test_an_empty_compressed_file_is_damaged_as_its_tool_says(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DamagedError, match="is damaged or cut off: it is empty"):
        kind_of_file(tmp_path / name)


def test_shards_and_datasets_are_known_when_they_are_incomplete(tmp_path):
    assert kind_of_folder(tmp_path) is None
    for files, kind in [
        (["manifest.json", "00000.tokens"], Kind.SHARDS),
        (["00000.tokens", "00000.index"], Kind.SHARDS),
        (["data-00000-of-00001.arrow", "dataset_info.json"], Kind.DATASET),
        (["data-00000-of-00001.arrow", "state.json"], Kind.DATASET),
        (["dataset_info.json", "state.json"], Kind.DATASET),
        (["dataset_info.json"], None),
        (["manifest.json"], None),
        (["00000.tokens"], None),
    ]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in files:
            (folder / name).write_text("cut {")
        assert kind_of_folder(folder) is kind
