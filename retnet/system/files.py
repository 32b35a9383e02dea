"""Atomic files: at any moment the old file or the new one is there, whole, also after a power cut.

A file is written under another name beside its target, flushed to the disk, and renamed.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which replaces `path` once all of it is on the disk.

    After an exception nothing of it remains, and `path` is as before. The name of the staged file is random, so that
    processes that write the same path at once do not share it.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(staged, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    flush(path.parent)


def write_json(path: Path, data: Any) -> None:
    """JSON, whole or not at all; the same data gives the same bytes."""
    with written_whole(path) as file:
        file.write(json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
