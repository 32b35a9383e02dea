import errno
import gzip
import json
import lzma
import os

import pytest

from retnet.data import readers
from retnet.data.plan import Piece, Settings
from retnet.data.readers import DataError, Reading


def piece_of(path, begin=0, end=None, kind=None):
    kind = kind or {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffixes[0], "text")
    end = path.stat().st_size if end is None else end
    return Piece(str(path), path.name, kind, begin, end, end - begin)


def read(path, *, utf8=True, begin=0, end=None, **settings):
    """(number, text) of each document."""
    reading = Reading(piece_of(path, begin, end), Settings(**settings), utf8=utf8)
    documents, open_text = [], b""
    for block in reading.blocks():
        open_text += block.data
        if block.last:
            documents.append((block.number, open_text))
            open_text = b""
    assert open_text == b""
    assert reading.progress == 1.0
    return documents


def test_a_text_file_is_one_document_and_an_empty_file_is_none(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\n\n\nend".encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    assert read(tmp_path / "a.txt") == [(-1, "naïve\n\n\nend".encode())]
    assert read(tmp_path / "empty.txt") == []


def test_a_separator_cuts_a_text_file_and_documents_know_their_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nmore\n\n\ntwo\n\n\n\n\n\n \n\n\nthree\n\n\n")
    assert read(path, separator="\n\n\n") == [(1, b"one\nmore"), (5, b"two"), (14, b"three")]
    assert path.read_bytes().split(b"\n")[13] == b"three"


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read_decompressed_and_damage_is_named(tmp_path, suffix, compress):
    path = tmp_path / f"a.txt{suffix}"
    whole = compress("naïve text ".encode() * 5000)
    path.write_bytes(whole)
    assert read(path) == [(-1, "naïve text ".encode() * 5000)]
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a\.txt\{suffix} is damaged or cut off"):
        read(path)


def test_invalid_utf8_is_named_by_line_and_accepted_as_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nth\xffree")
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8: invalid start byte 0xff"):
        read(path)
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8"):
        read(path, begin=4)
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8"):
        read(path, separator="\n")
    assert read(path, utf8=False) == [(-1, b"one\ntwo\nth\xffree")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("left", [0, 30, 33, 40, 44])
@pytest.mark.parametrize("begin", [0, 22])
def test_a_file_that_becomes_shorter_is_named(tmp_path, name, left, begin):
    path = tmp_path / name
    path.write_bytes(b'{"text": "one line"}\r\n' * 3)
    reading = Reading(piece_of(path, begin), Settings(separator="\n"), utf8=True)
    os.truncate(path, left)
    with pytest.raises(DataError, match=rf"{name} became shorter while it was read: it ends at byte \d+ and had 66"):
        list(reading.blocks())


def test_jsonl_gives_the_text_field_and_number_of_each_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "id": 1}) for text in ("first", "", "línea\ntwo", "x" * 100)]
    path.write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    assert read(path) == [(1, b"first"), (4, "línea\ntwo".encode()), (5, b"x" * 100)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON: Invalid control character"),
        (b'{"body": "x", "id": 3}', "no field 'text'; it has: body, id"),
        (b'{"text": 7}', "'text' is int, not text"),
        (b'{"text": {"a": 1}}', "'text' is object, not text"),
        (b'{"text": "a", "id": 1, "text": "b"}', "2 fields named 'text'; accepted: one"),
        (b'{"text": "a\\u0000b\0"}', "not JSON: Invalid control character"),
        (b'{"text": null}', "'text' is null, not text"),
        (b'["text"]', "a JSON list; accepted: an object with 'text'"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte 0xff"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "' + b"x" * 3000 + b'"}', "a line of more than 1.953 KiB"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(readers, "LINE_BYTES", 2000 if b"xxx" in line else 1 << 26)
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 2 + line + b"\n" + good)
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{message}"):
        read(path)
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{message}"):
        read(path, begin=len(good))  # a piece that begins at line 2


def test_parquet_and_arrow_give_a_column_and_name_bad_rows(tmp_path):
    import pyarrow as pa
    from pyarrow import ipc, parquet

    texts = [f"text {i}" for i in range(150)]
    table = pa.table({"text": texts, "number": range(150), "gaps": [None if i == 70 else "x" for i in range(150)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    group = Piece(str(tmp_path / "a.parquet"), "a", "parquet", 1, 2, 1, first_row=100)
    rows = Piece(str(tmp_path / "a.arrow"), "a", "arrow", 30, 110, 1, first_row=30)
    for piece, first, last in ((group, 100, 150), (rows, 30, 110)):
        blocks = list(Reading(piece, Settings(), utf8=True).blocks())
        assert [(b.number, b.data.decode()) for b in blocks] == [(i, f"text {i}") for i in range(first, last)]
        with pytest.raises(DataError, match=r"no column 'body'; it has: text, number, gaps"):
            list(Reading(piece, Settings("body"), utf8=True).blocks())
        with pytest.raises(DataError, match="column 'number' holds int64; accepted: strings"):
            list(Reading(piece, Settings("number"), utf8=True).blocks())
    with pytest.raises(DataError, match=r"a\.arrow row 70: 'gaps' is null, not text"):
        list(Reading(rows, Settings("gaps"), utf8=True).blocks())


def test_a_damaged_parquet_file_is_named(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [str(i) * 50 for i in range(1000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet row 0 or after"):
        list(Reading(Piece(str(path), "a", "parquet", 0, 1, 1), Settings(), utf8=True).blocks())


def piece_of_rows(path, kind="json"):
    return Piece(str(path), path.name, kind, 0, path.stat().st_size, 1)


def rows_of(path, kind="json", **settings):
    reading = Reading(piece_of_rows(path, kind), Settings(**settings), utf8=True)
    return [(block.number, block.data.decode()) for block in reading.blocks()]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_a_json_array_gives_the_text_field_of_each_object(tmp_path, monkeypatch, indent, block_bytes):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.json"
    records = [{"text": text, "n": [1, {"text": "no"}]} for text in ("first", "", 'línea "two"\n]', "状" * 50)]
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    assert rows_of(path) == [(0, "first"), (2, 'línea "two"\n]'), (3, "状" * 50)]
    path.write_text("[]")
    assert rows_of(path) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"', r"a\.json row 1: not JSON: "),
        (b'[{"text": "a"} {"text": "b"}]', r"a\.json row 1: not JSON: '{'; accepted: ','"),
        (b'[{"text": "a"}', r"a\.json row 1: not JSON: the end of the file; accepted: ','"),
        (b'[{"text": "a"}] []', r"a\.json row 1: not JSON: '\['; accepted: nothing more"),
        (b'[{"text": "a"}, 3]', r"a\.json row 1: a JSON int; accepted: an object with 'text'"),
        (b'[{"text": "a"}, {"body": "b"}]', r"a\.json row 1: no field 'text'; it has: body"),
        (b'[{"text": "a"}, {"text": null}]', r"a\.json row 1: 'text' is null, not text"),
        (b'[{"text": "a"}, {"text": "\xff"}]', r"a\.json row \d or after: not UTF-8: invalid start byte"),
        (b'[{"text": "a"}, {"text": "b"},]', r"a\.json row 2: not JSON: "),
        (b'[{"text": "a"}, {"text": "\0"}]', r"a\.json row 1: not JSON: Invalid control character"),
        (b'[{"text": "a"}, ' + b"[" * 100_000, r"a\.json row 1: not JSON"),
    ],
)
def test_a_bad_object_of_a_json_array_is_named(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / "a.json")


def test_strings_of_a_table_that_are_not_utf8_are_named_by_row(tmp_path):
    import pyarrow as pa
    from pyarrow import ipc, parquet

    texts = pa.array([b"good"] * 70 + [b"b\xffd"]).view(pa.binary()).cast(pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())})
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for piece in (
        Piece(str(tmp_path / "a.parquet"), "a", "parquet", 0, 1, 1),
        Piece(str(tmp_path / "a.arrow"), "a", "arrow", 0, 71, 1),
    ):
        with pytest.raises(DataError, match=rf"{piece.path} row 70: 'text' is not UTF-8: invalid start byte at byte 1"):
            list(Reading(piece, Settings(), utf8=True).blocks())


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import ipc, parquet

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["text", "text", "id"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for kind in ("parquet", "arrow"):
        piece = Piece(str(tmp_path / f"a.{kind}"), "a", kind, 0, 1, 1)
        with pytest.raises(DataError, match=rf"a\.{kind}: 2 columns named 'text'; it has: text, text, id"):
            list(Reading(piece, Settings(), utf8=True).blocks())


def test_an_error_of_the_disk_names_the_file_that_was_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def fail(self, raw):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Reading, "_advance", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.txt'"):
        read(tmp_path / "a.txt")


def test_damaged_offsets_of_an_arrow_file_are_an_error_and_end_no_process(tmp_path):
    import pyarrow as pa
    from pyarrow import ipc

    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["six ab"] * 100})
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    data = path.read_bytes()
    offsets = b"".join((6 * i).to_bytes(4, "little") for i in range(101))
    assert data.count(offsets) == 1
    for damaged in (1 << 30, (1 << 32) - 5, 3):
        wrong = offsets[:200] + damaged.to_bytes(4, "little") + offsets[204:]
        path.write_bytes(data.replace(offsets, wrong))
        with pytest.raises(DataError, match=r"a\.arrow row 0 or after: "):
            list(Reading(Piece(str(path), "a", "arrow", 0, 100, 1), Settings(), utf8=True).blocks())
