"""Atomic files and JSON: at every moment, also after a power failure, a path holds its old content or its new one.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol


class Readable(Protocol):
    """A path whose content can be read: of this machine, or in a store."""

    def read_bytes(self) -> bytes: ...

    def open(self, mode: Literal["rb"], /) -> BufferedReader: ...


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which replaces `path` once all of it is on the disk.

    After an exception the new file is removed and `path` is unchanged; an error of the disk names `path`. Temporary
    names are random, so that processes that write the same path at the same time do not share one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                yield file
            move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Give errors of the operating system that name no file, such as a full disk during a write, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, as `json_bytes`."""
    with written_whole(path) as file:
        file.write(json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """JSON as the content of a file. Equal data gives equal bytes.

    A byte of a file name that is not UTF-8, half a surrogate pair to Python, is written as its escape in JSON.
    """
    return json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_json(path: Readable) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError if it cannot be read, ValueError if it holds anything else."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are both ValueErrors
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is a JSON {type(data).__name__}; accepted: an object")
    return data


def move_into_place(written: Path, target: Path) -> None:
    """Flush a finished file and rename it to `target` on the same file system, replacing what has that name."""
    flush(written)
    os.replace(written, target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk. Windows cannot flush folders."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Readable) -> str:
    """SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
