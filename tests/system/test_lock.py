"""One writer per folder, also after a holder was killed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from retnet.system.lock import LOCK_FILE, Locked, locked

HOLD = """
import os, sys, time
from pathlib import Path
from retnet.system.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork() if len(sys.argv) > 2 else 1
    if child:
        print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """A function that starts a process which holds the lock of tmp_path; with a child if asked for."""
    started = []

    def start(*arguments):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), *arguments], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_writer_is_refused_with_the_process_that_holds_the_lock(tmp_path, hold):
    holder = hold()
    for _ in range(2):  # a refused writer leaves the lock as it is
        refused = pytest.raises(Locked, match=rf"written by process {holder.pid} on .*; accepted: another folder")
        with refused, locked(tmp_path):
            pass
    assert holder.poll() is None


@pytest.mark.parametrize("arguments", [[], ["with a child"]], ids=["alone", "with a child that lives on"])
def test_the_lock_of_a_killed_process_does_not_block(tmp_path, hold, arguments):
    holder = hold(*arguments)
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_second_writer_of_the_same_process_is_refused_by_any_spelling_of_the_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with locked(tmp_path / "out"):
        for name in ("out", "./out/../out", "link"):
            refused = pytest.raises(Locked, match=f"{name} is being written by process {os.getpid()} on ")
            with refused, locked(tmp_path / name):
                pass
        other = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "link")], capture_output=True, text=True)
        assert f"written by process {os.getpid()} on" in other.stderr


def test_a_lock_is_released_after_an_error_and_a_removed_folder(tmp_path):
    folder = tmp_path / "new" / "folder"
    with pytest.raises(RuntimeError, match="failed"), locked(folder):
        raise RuntimeError("failed")
    with locked(folder):
        (folder / LOCK_FILE).unlink()
        folder.rmdir()
        other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
        assert other.stdout.readline() == b"locked\n"
    assert str(other.pid) in (folder / LOCK_FILE).read_text()
    other.kill()
    other.communicate()
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_writers_that_come_and_go_never_hold_a_lock_together(tmp_path):
    """The file is removed by every holder, while others open it."""
    script = """
import os, sys
from pathlib import Path
from retnet.system.lock import Locked, locked
folder, held = Path(sys.argv[1]), 0
while held < 30:
    try:
        with locked(folder):
            held += 1
            os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))  # fails if another holds the lock
            os.unlink(folder / "alone")
    except Locked:
        pass
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
