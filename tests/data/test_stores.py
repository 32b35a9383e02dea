"""Sources and token shards in stores that fsspec reaches, here `memory://`, which needs no server."""

from __future__ import annotations

import gzip
import json
import uuid

import fsspec
import pytest

from retnet.data import open_corpus
from retnet.data.build import build_shards
from retnet.data.merge import merge_parts
from retnet.data.parts import Part, write_part
from retnet.data.plan import Settings, make_plan
from retnet.data.readers import DataError
from retnet.data.sources import PathsByKind, SourceWarning, find_source
from retnet.data.stores import StorePath, location
from retnet.system.extras import MissingExtra
from tests.data.folders import contents

SETTINGS = Settings(separator="\n--\n")


@pytest.fixture
def store():
    """A folder of its own in memory."""
    name = f"memory://{uuid.uuid4().hex}"
    yield name
    fsspec.filesystem("memory").rm(name, recursive=True)


@pytest.fixture
def files(articles, tmp_path):
    """Files of each kind, as name -> content: text, jsonl, compressed, parquet, hidden, binary, in folders."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": articles[:9]}), tmp_path / "table.parquet", row_group_size=4)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in articles).encode()
    return {
        "a.txt": "\n--\n".join(articles).encode(),
        "b.jsonl": lines,
        "deep/er/c.jsonl.gz": gzip.compress(lines, mtime=0),
        "deep/d.json": json.dumps([{"text": text} for text in articles[:5]]).encode(),
        "deep/e.parquet": (tmp_path / "table.parquet").read_bytes(),
        ".hidden": b"hidden",
        ".folder/f.txt": b"hidden too",
        "g.bin": b"\0\1\2",
        "h.txt": b"",
    }


@pytest.fixture
def both(files, store, tmp_path):
    """The same files in a folder and in a store."""
    for name, data in files.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (StorePath(f"{store}/source") / name).write_bytes(data)
    return tmp_path / "source", f"{store}/source"


def downloaded(url):
    system, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{path}/"): system.cat_file(name) for name in system.find(path)}


@pytest.mark.filterwarnings("ignore::retnet.data.sources.SourceWarning")
def test_a_source_in_a_store_and_a_corpus_in_a_store_have_the_bytes_of_local_ones(
    both, store, tmp_path, tokenizer_file
):
    local, remote = both
    options = {"tokenizer": str(tokenizer_file), "settings": SETTINGS, "shard_size": 15_000, "workers": 1}
    build_shards([str(local)], tmp_path / "expected", **options)
    expected = contents(tmp_path / "expected")
    assert len(expected) > 12
    build_shards([remote], tmp_path / "from_store", **options)
    assert contents(tmp_path / "from_store") == expected
    for text in ("2/3", "1/3", "3/3"):
        write_part([remote], f"{store}/out", Part.parse(text), **options)
    merge_parts(f"{store}/out")
    assert downloaded(f"{store}/out") == expected
    assert not fsspec.filesystem("memory").find(f"{store}/out.parts")


def test_folders_in_stores_are_searched_as_local_ones(both):
    local, remote = both
    for zeros in (False, True):
        ours, theirs = (find_source(place, zeros=zeros) for place in map(str, both))
        assert [(f.name, f.size, f.kind) for f in ours.files] == [(f.name, f.size, f.kind) for f in theirs.files]
        assert ours.left_out == theirs.left_out
    left_out = PathsByKind()
    with pytest.warns(SourceWarning, match="left out 1 binary file"):
        plan = make_plan([remote], SETTINGS, 5000, left_out)
    assert dict(left_out.counts) == {"binary file": 1, "empty file": 1, "hidden file": 1, "hidden folder": 1}
    assert [p.name for p in plan[0]] == ["source/a.txt"]
    (single,) = find_source(f"{remote}/a.txt").files
    assert (single.name, single.size) == ("a.txt", (local / "a.txt").stat().st_size)


def test_errors_name_the_url(both, store):
    _, remote = both
    broken = StorePath(f"{store}/broken.jsonl")
    broken.write_bytes(b'{"text": "good"}\n{broken\n')
    with pytest.raises(DataError, match=r"memory:///.*/broken\.jsonl:2: not JSON"):
        write_part([str(broken)], f"{store}/out", Part(1, 1))
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: memory:///.*/gone \(accepted: files"):
        find_source(f"{store}/gone")
    with pytest.raises(ValueError, match=r"source/inside lies inside memory:///.*source and would be read as text"):
        write_part([remote], f"{remote}/inside", Part(1, 1), settings=SETTINGS)
    with pytest.raises(ValueError, match=r"nope://a cannot be opened: Protocol not known: nope; accepted: a path, or"):
        location("nope://a")
    with pytest.raises(ValueError, match=r"a\.txt holds 1 text file \(a\.txt\); accepted: token shards, or plain text"):
        open_corpus(f"{remote}/a.txt")


def test_a_corpus_that_is_there_and_files_of_others_are_left_alone(store):
    StorePath(f"{store}/a.txt").write_bytes(b"text")
    StorePath(f"{store}/out/notes.txt").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"out holds notes\.txt, which is none of the shards"):
        write_part([f"{store}/a.txt"], f"{store}/out", Part(1, 1))
    write_part([f"{store}/a.txt"], f"{store}/whole", Part(1, 1))
    merge_parts(f"{store}/whole")
    with pytest.raises(ValueError, match="whole exists; accepted: a new folder"):
        write_part([f"{store}/a.txt"], f"{store}/whole", Part(1, 1))
    with pytest.raises(ValueError, match="whole holds token shards; accepted: a copy on this machine"):
        open_corpus(f"{store}/whole")


def test_a_file_in_a_store_that_changes_while_it_is_read_is_named(store):
    path = StorePath(f"{store}/a.txt")
    path.write_bytes(b"text")
    with pytest.raises(DataError, match=r"a\.txt changed since the run began"):
        write_part([str(path)], f"{store}/out", Part(1, 1), on_progress=lambda progress: path.write_bytes(b"tex!"))


def test_a_url_of_s3_names_its_extra_and_a_url_of_a_file_is_a_path(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingExtra, match=r"s3:// needs s3fs, which is not installed; accepted: .*\[s3\]"):
        location("s3://bucket/texts")
    assert location(f"file://{tmp_path}/a") == tmp_path / "a"
