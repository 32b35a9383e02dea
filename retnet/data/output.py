"""The folder that shards are written to: it is new, and outside the sources."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from retnet.data.stores import Location, StorePath, location


def check_new(out: Path) -> None:
    """Raise ValueError if there is something in the folder to write."""
    if _exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; accepted: a new or empty folder")


def check_outside(out: Location, sources: Sequence[str]) -> None:
    """Raise ValueError if the folder to write lies inside a source."""
    for source in map(location, sources):
        if isinstance(out, Path) and isinstance(source, Path):
            inside = real_path(out).is_relative_to(real_path(source))
        else:
            inside = isinstance(out, StorePath) and isinstance(source, StorePath) and out.is_relative_to(source)
        if inside:
            raise ValueError(f"{out} lies inside {source} and would be read as text; accepted: a folder outside it")


def _exists(path: Path) -> bool:
    """Whether there is such a path. Raises OSError if that cannot be told, as for a link to itself."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def real_path(path: str | Path) -> Path:
    """The path through links, as far as they lead."""
    return Path(os.path.realpath(path))
