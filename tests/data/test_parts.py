"""Parts of `retnet data` and their merge: the bytes of one process, whoever wrote the parts; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from retnet.data import merge as merge_module
from retnet.data.build import build_shards
from retnet.data.merge import merge_parts
from retnet.data.parts import Part, PartsFolder, write_part
from retnet.data.plan import Settings
from retnet.data.readers import DataError
from tests.data.folders import SEPARATOR, contents, write_texts

SETTINGS = Settings(separator=SEPARATOR)
SIZE = 10_000

pytestmark = pytest.mark.filterwarnings("ignore:.*each text file is a document too:UserWarning")


def part_of(source, out, text, **options):
    options = {"settings": SETTINGS, "shard_size": SIZE, "workers": 1} | options
    return write_part([str(source)], str(out), Part.parse(text), **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory, articles):
    folder = tmp_path_factory.mktemp("parts") / "source"
    write_texts(folder, articles)
    return folder


@pytest.fixture(scope="module")
def expected(source, tokenizer_file):
    """The files that one process writes."""
    out = source.parent / "expected"
    build_shards([str(source)], out, tokenizer=str(tokenizer_file), settings=SETTINGS, shard_size=SIZE, workers=1)
    found = contents(out)
    assert "00004.tokens" in found
    return found


@pytest.mark.parametrize("order", [["1/1"], ["3/3", "1/3", "2/3"], [f"{k}/8" for k in (5, 2, 8, 1, 7, 3, 6, 4)]])
def test_any_number_of_parts_in_any_order_gives_the_bytes_of_one_process(
    source, expected, tokenizer_file, tmp_path, order
):
    for text in order:
        result = part_of(source, tmp_path / "out", text, tokenizer=str(tokenizer_file))
        assert result.written == result.shards == len(range(int(text[0]) - 1, result.all_shards, len(order)))
    manifest = merge_parts(str(tmp_path / "out"))
    assert contents(tmp_path / "out") == expected
    assert json.loads(expected["manifest.json"]) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parts_run_twice_with_another_number_and_copied_from_two_machines_change_no_byte(
    source, expected, tokenizer_file, tmp_path
):
    options = {"tokenizer": str(tokenizer_file)}
    copy = tmp_path / "elsewhere/source"  # another folder, other times
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    part_of(source, tmp_path / "here/out", "2/3", **options)
    assert part_of(source, tmp_path / "here/out", "2/3", **options).written == 0
    part_of(copy, tmp_path / "there/out", "1/2", **options)
    shutil.copytree(tmp_path / "there/out.parts", tmp_path / "here/out.parts", dirs_exist_ok=True)
    result = part_of(source, tmp_path / "here/out", "1/1", **options)
    assert 0 < result.written < result.all_shards == result.shards
    (tmp_path / "here/out.parts/data/.00000.tokens.17.part").write_bytes(b"of a process that was killed")
    merge_parts(str(tmp_path / "here/out"))
    assert contents(tmp_path / "here/out") == expected


def test_a_part_killed_in_the_middle_of_a_shard_and_run_again_changes_no_byte(
    source, expected, tokenizer_file, tmp_path
):
    program = f"""
import sys, time
from retnet.data import parts, shard_writer
from retnet.data.plan import Settings
shard_writer.BATCH_BYTES = 500
def slowly(progress):
    if progress.counts.size > 12_000:
        print("writing", flush=True)
        time.sleep(60)
parts.write_part(sys.argv[1:2], sys.argv[2], parts.Part(1, 1), tokenizer=sys.argv[3],
    settings=Settings(separator={SEPARATOR!r}), shard_size={SIZE}, workers=1, on_progress=slowly)
"""
    arguments = [sys.executable, "-c", program, str(source), str(tmp_path / "out"), str(tokenizer_file)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    names = sorted(os.listdir(tmp_path / "out.parts/records"))
    assert names == ["00000.json"]
    assert any(name.startswith(".00001") for name in os.listdir(tmp_path / "out.parts/data"))
    with pytest.raises(ValueError, match=r"4 of 5 shards of .*out are not written: 00001, 00002, 00003, 00004; acc"):
        merge_parts(str(tmp_path / "out"))
    part_of(source, tmp_path / "out", "1/1", tokenizer=str(tokenizer_file))
    merge_parts(str(tmp_path / "out"))
    assert contents(tmp_path / "out") == expected


def test_a_part_of_another_plan_is_refused_before_it_writes(source, tmp_path):
    mine, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source, mine)
    part_of(mine, out, "1/8")
    before = contents(tmp_path / "out.parts")

    def refuse(other, **options):
        with pytest.raises(ValueError, match=rf"out\.parts holds parts of another plan: other {other}; accepted"):
            part_of(mine, out, "2/8", **options)
        assert contents(tmp_path / "out.parts") == before

    refuse(r"shards \(--shard-size\)", shard_size=2 * SIZE)
    refuse(r"settings \(--separator\)", settings=Settings(separator="\n"))
    (mine / "new.txt").write_text("one\n--\nmore")
    refuse(r"files \(source/new\.txt\)")
    (mine / "new.txt").unlink()
    text = (mine / "a.txt").read_bytes()
    (mine / "a.txt").write_bytes(text.replace(b"token", b"nekot", 1))  # as long as before, cut at the same places
    refuse(r"files \(source/a\.txt\)")
    (mine / "a.txt").write_bytes(text)
    part_of(mine, out, "2/8")


def test_a_part_with_another_tokenizer_is_refused(source, tokenizer_file, tmp_path):
    part_of(source, tmp_path / "out", "1/8", tokenizer=str(tokenizer_file))
    with pytest.raises(ValueError, match="other tokenizer, files of the tokenizer;"):
        part_of(source, tmp_path / "out", "1/8")
    with pytest.raises(ValueError, match="other tokenizer;"):
        part_of(source, tmp_path / "out", "1/8", tokenizer=str(tokenizer_file), with_end=True)


def test_a_shard_of_another_plan_is_refused_at_the_merge_by_name(source, tokenizer_file, tmp_path):
    part_of(source, tmp_path / "out", "1/1")
    part_of(source, tmp_path / "other", "1/1", with_end=False, tokenizer=str(tokenizer_file))
    for name in ("records/00003.json", *(f"data/00003.{suffix}" for suffix in ("tokens", "index", "json"))):
        shutil.copy(tmp_path / "other.parts" / name, tmp_path / "out.parts" / name)
    message = r"shard 00003 of .*out was written by another plan: other tokenizer, files of the tokenizer; accepted: "
    with pytest.raises(ValueError, match=message):
        merge_parts(str(tmp_path / "out"))
    shutil.copy(tmp_path / "other.parts/data/00003.tokens", tmp_path / "out.parts/data/00099.tokens")
    with pytest.raises(ValueError, match=r"holds 00099\.tokens, which is none of the shards"):
        merge_parts(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_or_half_written_shard_is_named_and_written_again(source, tmp_path, damage):
    part_of(source, tmp_path / "out", "1/1", shard_size=30_000)
    for suffix in ("tokens", "index", "json"):
        file = tmp_path / f"out.parts/data/00001.{suffix}"
        data = file.read_bytes()
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(ValueError, match=rf"00001\.{suffix} is (damaged or half written|missing)"):
            merge_parts(str(tmp_path / "out"))
        assert part_of(source, tmp_path / "out", "1/1", shard_size=30_000).written == 1
        assert file.read_bytes() == data


def test_a_merge_killed_at_any_moment_is_finished_by_another(source, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    for step in ("save_json", "flush", "_remove"):
        out = tmp_path / step
        part_of(source, out, "1/1", shard_size=30_000)
        with monkeypatch.context() as patch:
            patch.setattr(merge_module, step, killed)
            with pytest.raises(Killed):
                merge_parts(str(out))
        manifest = merge_parts(str(out))
        assert json.loads((out / "manifest.json").read_text()) == manifest
        assert not PartsFolder(str(out)).folder.exists()


def test_a_part_after_the_merge_and_a_merge_without_parts_are_refused(source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no parts of .*out: there is no .*plan\.json; accepted: OUT of"):
        merge_parts(str(tmp_path / "out"))
    part_of(source, tmp_path / "out", "1/1")
    merge_parts(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="out exists; accepted: a new or empty folder"):
        part_of(source, tmp_path / "out", "1/2")
    with pytest.raises(FileNotFoundError, match="out is a corpus already; accepted: OUT of parts"):
        merge_parts(str(tmp_path / "out"))


def test_a_plan_and_a_record_that_are_none_are_named(source, tmp_path):
    part_of(source, tmp_path / "out", "1/1", shard_size=30_000)
    for name, content, message in [
        ("records/00001.json", "{}", r"00001\.json is not the record of a shard; accepted: records that"),
        ("records/00001.json", '{"plan": ', r"00001\.json is not JSON"),
        ("plan.json", '{"format": "other"}', "plan.json is other version None; accepted: retnet-parts version 1"),
        (
            "plan.json",
            '{"format": "retnet-parts", "version": 1}',
            r"plan\.json has no 'sources'; accepted: a plan that",
        ),
    ]:
        file = tmp_path / "out.parts" / name
        before = file.read_text()
        file.write_text(content)
        for act in (
            lambda: merge_parts(str(tmp_path / "out")),
            lambda: part_of(source, tmp_path / "out", "1/1", shard_size=30_000),
        ):
            with pytest.raises(ValueError, match=message):
                act()
        file.write_text(before)
    merge_parts(str(tmp_path / "out"))


def test_bad_data_ends_a_part_and_the_shards_of_others_stay(source, tmp_path):
    mine = tmp_path / "source"
    shutil.copytree(source, mine)
    with open(mine / "b.jsonl", "a") as file:
        file.write("{broken\n")
    result = part_of(mine, tmp_path / "out", "1/5")
    assert result.shards == 1
    with pytest.raises(DataError, match=r"b\.jsonl:61: not JSON"):
        part_of(mine, tmp_path / "out", "5/5")
    assert os.listdir(tmp_path / "out.parts/records") == ["00000.json"]


def test_a_source_that_changes_while_a_part_reads_it_leaves_no_record(source, tmp_path):
    mine = tmp_path / "source"
    shutil.copytree(source, mine)

    def touch(progress):
        os.utime(mine / "a.txt", ns=(0, time.time_ns()))

    with pytest.raises(DataError, match=r"a\.txt changed since the run began"):
        part_of(mine, tmp_path / "out", "1/1", on_progress=touch)
    assert not (tmp_path / "out.parts/records").exists()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "3", "a/b", "-1/2", "1/2/3", " 1/2", "", "١/٢"])
def test_shares_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"--shard is .*; accepted: k/n with 1 <= k <= n, such as 2/8"):
        Part.parse(text)
