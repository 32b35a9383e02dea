"""Locks between processes: of a folder that one run at a time may write, and of a file for a moment.

The lock is a `flock`, which the operating system releases however the process ends. That of a folder is on a file in
it. The file names the holder for the error message of the others, and is removed at the end.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LOCK_FILE = ".lock"
RELEASE_SECONDS = 2.0  # how long a lock may outlive its holder
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # of file systems without locks
_held: set[BinaryIO] = set()


class Locked(OSError):
    """Another run is writing the folder. The message says which process."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, made if missing. Raises Locked if another process or thread holds the lock.

    Warns and continues where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    file = _acquire(path)
    _held.add(file)
    try:
        yield
    finally:
        if _is_file(file, path):  # the folder may have been removed, and made again by another process
            path.unlink()
        _held.discard(file)
        file.close()


@contextmanager
def waiting_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, made if missing, for a moment; waits for other processes and threads. The file stays.

    Warns and continues where the file system has no locks.
    """
    with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        _held.add(file)
        try:
            _lock(file, wait=True)
            yield
        finally:
            _held.discard(file)


def _acquire(path: Path) -> BinaryIO:
    """The open lock file, locked."""
    patience = time.monotonic() + RELEASE_SECONDS
    while True:
        file = path.open("a+b")
        try:
            _lock(file)
            if _is_file(file, path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                file.flush()
                return file
            file.close()
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read(200).decode(errors="replace").strip() or "another process"
            if _has_ended(holder) and time.monotonic() < patience:
                time.sleep(0.02)  # a process that it was forking when it ended is about to close the file
                continue
            raise Locked(
                f"{path.parent} is being written by {holder}; accepted: another folder, or this one when that process "
                "has ended"
            ) from error
        except BaseException:
            file.close()
            raise


def _has_ended(holder: str) -> bool:
    """Whether the holder that a lock file names was a process of this machine that has ended."""
    named = re.fullmatch(r"process (\d+) on (.+)", holder)
    if named is None or named[2] != socket.gethostname():
        return False
    try:
        os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _is_file(file: BinaryIO, path: Path) -> bool:
    """Whether the open file still has its name, which its last holder or the removal of the folder may have taken."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO, wait: bool = False) -> None:
    """Raises BlockingIOError if the lock is held, unless it is to wait."""
    try:
        import fcntl
    except ImportError:  # Windows
        warnings.warn(f"{file.name} cannot be locked on this system: do not write this folder twice", stacklevel=4)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{file.name} cannot be locked ({error}): do not write this folder twice", stacklevel=4)


def _close_in_child() -> None:
    """Close the locks that a forked process inherits: with them open it would hold them after its parent was killed."""
    for file in _held:
        os.close(file.fileno())
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
