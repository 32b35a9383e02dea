"""Whole runs of `retnet data`: the files that they write, and the files after a failure."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pytest

from retnet.data import blocks, open_corpus, shard_writer, shards
from retnet.data.build import build_shards
from retnet.data.plan import Settings
from retnet.data.readers import DataError
from retnet.system.lock import Locked, locked
from tests.data.folders import SEPARATOR, contents, interrupt, texts_of

pytestmark = pytest.mark.filterwarnings("ignore:.*each text file is a document too:UserWarning")


def test_shards_give_back_every_document_and_the_counts_of_the_manifest(build, tmp_path, articles):
    manifest = build(tmp_path / "out")
    corpus = open_corpus(tmp_path / "out")
    assert texts_of(corpus) == articles + [text[::-1] for text in articles]
    assert len(manifest["shards"]) > 5
    assert manifest["documents"] == len(corpus) == 120
    assert manifest["tokens"] == corpus.num_tokens == int(corpus.lengths.sum())
    assert manifest["bytes"] == corpus.num_bytes == 2 * sum(len(text.encode()) for text in articles)
    assert all(corpus.tokens(d)[0] == corpus.document_start for d in range(120))
    assert json.loads((tmp_path / "out/manifest.json").read_bytes()) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_the_number_of_processes_changes_no_byte(build, tmp_path):
    build(tmp_path / "one")
    build(tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shard_sizes_change_no_token(build, tmp_path):
    build(tmp_path / "small", 500)
    build(tmp_path / "large", None)
    small, large = open_corpus(tmp_path / "small"), open_corpus(tmp_path / "large")
    assert len(small.folder.shards) > 20
    assert len(large.folder.shards) == 1
    assert texts_of(small) == texts_of(large)
    assert [small.tokens(d).tolist() for d in range(120)] == [large.tokens(d).tolist() for d in range(120)]
    assert [small.describe(d) for d in range(120)] == [large.describe(d) for d in range(120)]


def test_documents_say_the_line_they_begin_at(build, tmp_path, source):
    build(tmp_path / "out", 700)
    corpus = open_corpus(tmp_path / "out")
    lines = (source / "a.txt").read_text(encoding="utf-8").split("\n")
    for document in (0, 7, 31, 59):
        name, line = corpus.describe(document).split(":")
        assert name == "source/a.txt"
        assert texts_of(corpus)[document].split("\n")[0] == lines[int(line) - 1]
    assert corpus.describe(119) == "source/b.jsonl:60"


def test_a_document_longer_than_a_shard_and_a_block_stays_whole(build, tmp_path, articles, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    text = " ".join(articles)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    build(tmp_path / "out", 1000, sources=[str(tmp_path / "long.txt")])
    corpus = open_corpus(tmp_path / "out")
    assert len(text.encode()) > 12_000
    assert texts_of(corpus) == [text]


def test_document_ends_are_written_with_with_end(build, tmp_path):
    build(tmp_path / "out", with_end=True)
    corpus = open_corpus(tmp_path / "out")
    assert all(corpus.tokens(d)[-1] == corpus.tokens(d)[0] == corpus.document_start for d in range(len(corpus)))
    without_ends = build(tmp_path / "plain")
    assert corpus.num_tokens == without_ends["tokens"] + 120


def test_a_bad_line_is_named_and_no_file_remains(build, tmp_path, source):
    with open(source / "b.jsonl", "a") as file:
        file.write("{broken\n")
    before = sorted(tmp_path.rglob("*"))
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"b\.jsonl:61: not JSON"):
            build(tmp_path / "out", workers=workers)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl"])
@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_source_that_changes_during_the_run_is_named_and_no_file_remains(build, tmp_path, source, name, change):
    path = source / name
    size = path.stat().st_size

    def change_it(progress):
        if change != "gone":
            os.truncate(path, size - 1 if change == "shorter" else size + 1)
        elif progress.counts.size == progress.size:  # before, a worker would fail to open it
            path.unlink(missing_ok=True)

    message = {"shorter": "changed|shorter", "longer": "changed since the run began", "gone": "disappeared while"}[
        change
    ]
    with pytest.raises(DataError, match=rf"{name.replace('.', '[.]')} .*{message}"):
        build(tmp_path / "out", on_progress=change_it)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_text_without_tokens_is_named_and_no_file_remains(build, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"known": 0, "<s>": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "words.json"))
    lines = ['{"text": "known"}\n'] * 60
    lines[40] = '{"text": "known unheard"}\n'
    (tmp_path / "a.jsonl").write_text("".join(lines))
    before = sorted(tmp_path.rglob("*"))
    for workers in (1, 2):
        with pytest.raises(
            DataError, match=r"a\.jsonl:41: the tokenizer has no tokens for this text \(WordLevel error"
        ):
            build(
                tmp_path / "out",
                tokenizer=str(tmp_path / "words.json"),
                sources=[str(tmp_path / "a.jsonl")],
                shard_size=300,
                workers=workers,
            )
        assert sorted(tmp_path.rglob("*")) == before


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "BATCH_BYTES", 1 << 9)

    def peak(documents):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * documents)
        tracemalloc.start()
        try:
            manifest = build_shards([str(tmp_path / "a.jsonl")], tmp_path / f"out{documents}", workers=1)
            assert manifest["documents"] == documents
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # modules are loaded
    assert peak(20_000) < peak(5_000) + 100_000


def test_the_manifest_counts_the_files_that_were_left_out(build, tmp_path, source):
    (source / "empty").touch()
    (source / "linked").symlink_to(tmp_path)
    assert build(tmp_path / "out")["left_out"] == {"empty file": 1, "linked folder": 1}


def test_sources_without_text_leave_no_file(build, tmp_path):
    (tmp_path / "blank.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"no text in .*blank\.jsonl"):
        build(tmp_path / "out", sources=[str(tmp_path / "blank.jsonl")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blank.jsonl", "source"]


def test_shards_are_written_through_a_link_to_an_empty_folder(build, tmp_path):
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/real")
    assert build(tmp_path / "out")["documents"] == 120
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/real/manifest.json").is_file()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]
    with pytest.raises(ValueError, match="out exists"):
        build(tmp_path / "out")


def test_an_output_folder_that_cannot_be_replaced_is_refused_at_the_start(build, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()

    def refuse(self, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

    monkeypatch.setattr(Path, "rename", refuse)  # as a mount point does
    with pytest.raises(ValueError, match=r"out exists and cannot be replaced \(.*busy\); accepted: a folder that does"):
        build(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_progress_reaches_the_total_size(build, tmp_path):
    seen = []
    manifest = build(tmp_path / "out", on_progress=seen.append)
    assert seen[-1].counts == (seen[-1].size, manifest["documents"], manifest["tokens"])
    assert [progress.counts.size for progress in seen] == sorted(progress.counts.size for progress in seen)


def test_existing_files_are_never_overwritten(build, tmp_path):
    for name in ("out", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out exists; accepted: a new or empty folder"):
        build(tmp_path / "out")
    with pytest.raises(ValueError, match=r"other\.partial is in the way: it holds mine\.txt"):
        build(tmp_path / "other")
    assert (tmp_path / "other.partial/mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert build(tmp_path / "empty")["documents"] == 120


def test_the_output_is_never_read_as_a_source(build, tmp_path, source):
    with pytest.raises(ValueError, match=r"out lies inside .*source and would be read as text"):
        build(source / "sub/out")
    build(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out holds token shards; accepted: text; `retnet train`"):
        build(tmp_path / "again", sources=[str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_two_runs_into_one_folder_are_refused(build, tmp_path):
    refused = pytest.raises(Locked, match=r"out\.partial is being written by process \d+ on")
    with locked(tmp_path / "out.partial"), refused:
        build(tmp_path / "out")
    build(tmp_path / "out")


def test_unicode_survives_in_text_and_names(tmp_path):
    (tmp_path / "日本語").mkdir()
    (tmp_path / "日本語/ñ.txt").write_text("naïve 状态 😀", encoding="utf-8")
    build_shards([str(tmp_path / "日本語")], tmp_path / "out", workers=1)
    corpus = open_corpus(tmp_path / "out")
    assert texts_of(corpus) == ["naïve 状态 😀"]
    assert corpus.describe(0) == "日本語/ñ.txt"


def byte_name(folder, name):
    return Path(os.fsdecode(bytes(folder) + b"/" + name))


def test_file_names_that_are_not_utf8_are_built_resumed_and_described(tmp_path):
    import pyarrow as pa
    from pyarrow import ipc, parquet

    source = byte_name(tmp_path, b"caf\xe9")
    source.mkdir()
    byte_name(source, b"a\xff.txt").write_text("text")
    byte_name(source, b"b\xff.jsonl").write_text('{"text": "line"}\n')
    byte_name(source, b"c\xff.txt.zst").write_bytes(pa.compress(b"packed", "zstd", asbytes=True))
    with open(byte_name(source, b"d\xff.parquet"), "wb") as file:
        parquet.write_table(pa.table({"text": ["row"]}), file)
    table = pa.table({"text": ["last"]})
    with open(byte_name(source, b"e\xff.arrow"), "wb") as file, ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    out = byte_name(tmp_path, b"out\xff")
    with pytest.raises(KeyboardInterrupt):
        build_shards([str(source)], out, workers=2, shard_size=1, on_progress=interrupt)
    build_shards([str(source)], out, workers=2, shard_size=1)
    corpus = open_corpus(out)
    assert texts_of(corpus) == ["text", "line", "packed", "row", "last"]
    assert corpus.describe(0) == os.fsdecode(b"caf\xe9/a\xff.txt")
    assert [problem for _, problem in shards.check_shards(out)] == [None] * 5


def test_a_tokenizer_is_read_from_a_folder_whose_name_is_not_utf8(build, tmp_path):
    build(byte_name(tmp_path, b"out\xff"), workers=2)
    assert len(texts_of(open_corpus(byte_name(tmp_path, b"out\xff")))) == 120


def test_a_link_to_itself_is_an_error_that_names_it(build, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        build(tmp_path / "out", sources=[str(tmp_path / "loop")])
    with pytest.raises(OSError, match="loop"):
        build(tmp_path / "loop")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop", "source"]


@pytest.mark.parametrize("line", [5, 5000])
def test_a_zero_byte_in_a_line_of_jsonl_is_an_error_wherever_it_is(build, tmp_path, source, line):
    lines = ['{"text": "some text"}\n'] * 6000
    lines[line] = '{"text": "some\0text"}\n'
    (source / "c.jsonl").write_text("".join(lines))
    for sources in (source, source / "c.jsonl"):
        with pytest.raises(DataError, match=rf"c\.jsonl:{line + 1}: not JSON: Invalid control character"):
            build(tmp_path / "out", sources=[str(sources)])


def test_a_table_that_cannot_be_read_leaves_nothing(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    for name, table in {
        "bad": pa.table({"text": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())}),
        "twice": pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
    }.items():
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        for workers in (1, 2):
            with pytest.raises(DataError, match=rf"{name}\.parquet"):
                build_shards([str(tmp_path / f"{name}.parquet")] * 2, tmp_path / "out", workers=workers, shard_size=1)
            assert not list(tmp_path.glob("out*"))


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}
C4, DOLMA, PILE = "c4-train.00000-of-01024.json.gz", "dolma.json.gz", "pile.jsonl.zst"


@pytest.mark.parametrize("name", [C4, DOLMA, PILE, "a.json", "b.json.xz", "c.ndjson.bz2"])
def test_json_lines_are_read_under_the_names_that_data_sets_use(tmp_path, name):
    data = "".join(json.dumps({"text": f"text {i}", "url": "x"}) + "\n" for i in range(50)).encode()
    (tmp_path / name).write_bytes(COMPRESS.get(name.split(".")[-1], bytes)(data))
    build_shards([str(tmp_path / name)], tmp_path / "out", workers=1)
    assert texts_of(open_corpus(tmp_path / "out")) == [f"text {i}" for i in range(50)]
    with pytest.raises(DataError, match=r"1: no field 'body'; it has: text, url"):
        build_shards([str(tmp_path / name)], tmp_path / "body", settings=Settings("body"), workers=1)


def test_a_document_of_several_blocks_has_the_tokens_of_the_whole(build, tmp_path, articles, monkeypatch):
    text = "\n\u2003odd".join(articles * 3)
    (tmp_path / "a.txt").write_text(SEPARATOR.join(["short", text, "end"]), encoding="utf-8")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    assert build(tmp_path / "out", sources=[str(tmp_path / "a.txt")])["documents"] == 3
    corpus = open_corpus(tmp_path / "out")
    assert len(text.encode()) > 40_000
    assert corpus.tokens(1)[1:].tolist() == list(corpus.tokenizer.encode_batch([text.encode()])[0])
    assert texts_of(corpus) == ["short", text, "end"]
