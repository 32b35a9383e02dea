"""Interrupted and killed runs of `retnet data`: what they leave, and how they resume."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from retnet.data import build as build_module
from retnet.data import open_corpus
from retnet.data.plan import Settings
from tests.data.folders import SEPARATOR, contents, interrupt, texts_of

pytestmark = pytest.mark.filterwarnings("ignore:.*each text file is a document too:UserWarning")

SHARD_SIZE = 1 << 14


@pytest.fixture
def start(source, tokenizer_file, tmp_path):
    """Start `retnet data` on the source, made 20 times as long; `limit` is a shell command that runs before it."""
    texts = (source / "a.txt").read_text(encoding="utf-8")
    (source / "a.txt").write_text(SEPARATOR.join(f"{i} {texts}" for i in range(20)), encoding="utf-8")

    def run(limit="true"):
        words = [sys.executable, "-m", "retnet.cli", "data", source, tmp_path / "out", "--tokenizer", tokenizer_file]
        words += ["--separator", r"\n--\n", "--shard-size", SHARD_SIZE / 2**20, "--workers", 2]
        words = ["bash", "-c", f'{limit}; exec "$@"', "bash", *map(str, words)]
        # A shell's background processes ignore SIGINT, and so would this one if the tests run in the background.
        heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)

    return run


def stop_in_the_middle(process, data, number):
    """Send a signal once three shards are written; returns the finished shards and when they were written."""
    deadline = time.monotonic() + 60
    while len(list(data.glob("0*.json"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate()
    return {path.name: path.stat().st_mtime_ns for path in data.glob("0*.json")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_and_writes_the_same_bytes(start, build, tmp_path, number):
    process = start()
    done = stop_in_the_middle(process, tmp_path / "out.partial/data", number)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert not (tmp_path / "out").exists()
    manifest = build(tmp_path / "out", SHARD_SIZE)
    assert 3 <= len(done) < len(manifest["shards"])
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == done  # not written again
    build(tmp_path / "fresh", SHARD_SIZE)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not (tmp_path / "out.partial").exists()


def test_after_a_full_disk_only_whole_shards_remain_and_the_run_resumes(start, build, tmp_path):
    process = start("ulimit -f 5")
    _, message = process.communicate()
    assert process.returncode == 2
    assert re.search(rf"{os.strerror(errno.EFBIG)}: \S*/out\.partial/data/\S+\n", message)
    partial = tmp_path / "out.partial"
    assert f"finished shards are kept in {partial}: once there is room, the same command resumes" in message
    assert not (tmp_path / "out").exists()
    left = [path.name for path in (tmp_path / "out.partial/data").iterdir() if path.name != "tokenizer"]
    assert all((tmp_path / "out.partial/data" / name).with_suffix(".json").exists() for name in left)
    build(tmp_path / "out", SHARD_SIZE)
    assert len(texts_of(open_corpus(tmp_path / "out"))) == 120 + 19 * 60


def test_a_killed_worker_is_noticed_and_the_run_resumes(build, tmp_path):
    def kill_one(progress):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(ChildProcessError, match=r"a worker process died \(exit code -9"):
        build(tmp_path / "out", workers=2, on_progress=kill_one)
    assert not multiprocessing.active_children()
    build(tmp_path / "out")
    build(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_an_interrupted_run_resumes_only_with_the_same_arguments(build, tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", on_progress=interrupt)
    with pytest.raises(
        ValueError, match=r"out\.partial holds an interrupted run with other settings; accepted: the arguments of that"
    ):
        build(tmp_path / "out", settings=Settings(separator="\n"))
    with pytest.raises(ValueError, match="with other tokenizer"):
        build(tmp_path / "out", tokenizer="bytes")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "bytes", tokenizer="bytes", on_progress=interrupt)
    with pytest.raises(ValueError, match="with other tokenizer"):
        build(tmp_path / "bytes")
    with open(source / "a.txt", "a") as file:
        file.write("more")
    with pytest.raises(ValueError, match=r"with other files \(.*a\.txt\)"):
        build(tmp_path / "out")


def test_half_written_shards_are_removed(build, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", on_progress=interrupt)
    data = tmp_path / "out.partial/data"
    (data / "00002.tokens").write_bytes(b"half")
    (data / ".00003.index.999").write_bytes(b"half")
    build(tmp_path / "out")
    build(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def stop_at(monkeypatch, target, name):
    """Stop the run where it first calls a function."""

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(target, name, stop)


@pytest.mark.parametrize("bad", [False, True])
def test_a_run_killed_while_it_cleans_up_can_be_repeated(build, tmp_path, source, monkeypatch, bad):
    if bad:
        whole = (source / "b.jsonl").read_bytes()
        (source / "b.jsonl").write_bytes(whole + b"{broken\n")
        os.utime(source / "b.jsonl", ns=(1, 1))
    with monkeypatch.context() as patch:
        stop_at(patch, build_module.shutil, "rmtree")
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out")
    if bad:
        shutil.rmtree(tmp_path / "out.partial/data/tokenizer")  # what rmtree came to
        (source / "b.jsonl").write_bytes(whole)
        assert build(tmp_path / "out", tokenizer="bytes")["documents"] == 120
    else:
        shutil.rmtree(tmp_path / "out")
        assert build(tmp_path / "out")["documents"] == 120
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("lost", ["data", "data/tokenizer"])
def test_an_unfinished_run_without_its_data_starts_again(build, tmp_path, lost):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", on_progress=interrupt)
    shutil.rmtree(tmp_path / "out.partial" / lost)
    build(tmp_path / "out")
    build(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
