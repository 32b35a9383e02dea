"""Files that are either whole or not there, also after a power cut: written aside, flushed, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when all of it is on disk; nothing of it remains after an exception."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
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
