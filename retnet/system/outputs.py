"""Outputs of commands: what exists is not replaced, unless the user asks for it with `--force`.

Commands check before their work begins. Python functions that write a given path replace it, as `open(path, "w")` does.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new_file(path: Path, *, force: bool = False, accepted: str = "another file, or --force") -> None:
    """Raise FileExistsError if there is something at the path of a file to write."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; accepted: a file")
    if not force and _exists(path):
        raise FileExistsError(f"{path} exists; accepted: {accepted}")


def check_new_directory(path: Path, *, force: bool = False, accepted: str = "a new or empty directory") -> None:
    """Raise FileExistsError if there is something in the directory to write, or a file at its path."""
    if _exists(path) and not path.is_dir():
        raise FileExistsError(f"{path} is a file; accepted: a new or empty directory")
    if not force and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path} exists; accepted: {accepted}")


@contextmanager
def filled_directory(path: Path, errors: type[BaseException] = BaseException) -> Iterator[Path]:
    """A new or empty directory to fill. After an error of this class it is as it was."""
    is_new = not path.is_dir()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except errors:
        _empty(path)
        if is_new:
            path.rmdir()
        raise


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """A directory to fill: a new one beside `path`, which then takes its place with all that it holds.

    After an error `path` is as it was. A new or empty `path` is filled itself, as an empty one may be a mounted disk.
    """
    if not path.is_dir() or not any(path.iterdir()):
        with filled_directory(path):
            yield path
        return
    path = path.resolve()
    mark = f"{os.getpid()}.{secrets.token_hex(4)}"
    written, old = path.with_name(f".{path.name}.{mark}.part"), path.with_name(f".{path.name}.{mark}.old")
    written.mkdir()
    try:
        yield written
        path.rename(old)
        written.rename(path)
    finally:
        shutil.rmtree(written, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _exists(path: Path) -> bool:
    return os.path.lexists(path)
