"""Stores: files named by URL (`s3://bucket/texts`, `memory://texts`), read and written through fsspec.

A text with `://` in it names a store, and any other text a path of this machine. `StorePath` has the part of pathlib's
interface that sources and shards use, so that one code reads both. Credentials and endpoints are those that the library
of the store finds itself, in the environment or in its files.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

from retnet.system.extras import MissingExtra, require
from retnet.system.files import json_bytes, write_json

MARK = "://"
LOCAL = ("file", "local")
# Stores without folders that have to be made.
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "memory")
PER_PROCESS = "memory"  # other processes do not see its files
_BLOCK = 1 << 21  # bytes per request
_BUFFER = 1 << 16
_SAMPLE = 1 << 16


class StorePath:
    """A path in a store. Raises ValueError if fsspec cannot open it, MissingExtra for S3 without its library."""

    def __init__(self, url: str):
        self._store, self._path = _open_store(url)

    @property
    def name(self) -> str:
        return self._path.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> StorePath:
        return self._at(self._path.rstrip("/").rpartition("/")[0])

    @property
    def is_per_process(self) -> bool:
        """Whether other processes do not see the files of this store."""
        return PER_PROCESS in self._protocols

    def with_suffix(self, suffix: str) -> StorePath:
        return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    def with_name(self, name: str) -> StorePath:
        return self.parent / name

    def relative_to(self, other: StorePath) -> PurePosixPath:
        return PurePosixPath(self._path.rstrip("/")).relative_to(other._path.rstrip("/"))

    def is_relative_to(self, other: StorePath) -> bool:
        ours, theirs = str(self).rstrip("/"), str(other).rstrip("/")
        return ours == theirs or ours.startswith(f"{theirs}/")

    def exists(self) -> bool:
        return self._kind() is not None

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_symlink(self) -> bool:
        return False

    def open(self, mode: str) -> io.BufferedReader:
        """The file, to read ("rb")."""
        if mode != "rb":
            raise ValueError(f"mode is {mode!r}; accepted: 'rb' (`write_bytes` and `upload` write whole files)")
        with self._naming("read"):
            raw = self._store.open(self._path, "rb", block_size=_BLOCK)
        return io.BufferedReader(cast(Any, raw), _BUFFER)

    def read_bytes(self) -> bytes:
        with self._naming("read"):
            return self._store.cat_file(self._path)

    def write_bytes(self, data: bytes) -> None:
        """Write a file at once. Object stores show it when all of it has arrived."""
        with self._naming("written"):
            self._make_folder()
            self._store.pipe_file(self._path, data)

    def upload(self, file: Path) -> None:
        """Copy a file of this machine here."""
        with self._naming("written"):
            self._make_folder()
            self._store.put_file(str(file), self._path)

    def unlink(self, *, missing_ok: bool = False) -> None:
        try:
            with self._naming("removed"):
                self._store.rm_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def entries(self) -> dict[str, bool]:
        """The names in a folder -> whether each is a folder. Raises FileNotFoundError if there is none."""
        with self._naming("listed"):
            found = self._store.ls(self._path, detail=True)
        names = ((entry["name"].rstrip("/"), entry["type"] == "directory") for entry in found)
        own = self._path.rstrip("/")  # some stores list a marker of the folder itself
        return {path.rpartition("/")[2]: is_folder for path, is_folder in names if path.strip("/") != own.strip("/")}

    def size(self) -> int:
        """Bytes. Raises FileNotFoundError if there is no such file."""
        return int(self._info()["size"])

    def version(self) -> str:
        """A hash of the file's properties (times, ETag), which changes with the file."""
        with self._naming("read"):
            return self._store.ukey(self._path)

    def refresh(self) -> None:
        """Forget what earlier calls listed."""
        self._store.invalidate_cache()

    def __truediv__(self, name: str) -> StorePath:
        return self._at(f"{self._path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self._store.unstrip_protocol(self._path)

    def _info(self) -> dict[str, Any]:
        with self._naming("read"):
            return self._store.info(self._path)

    def _kind(self) -> str | None:
        """`file` or `directory`; None if there is neither."""
        try:
            return self._info()["type"]
        except FileNotFoundError:
            return None

    @contextmanager
    def _naming(self, deed: str) -> Iterator[None]:
        """Turn the errors of libraries, which have many kinds and no names, into OSErrors that name the URL."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, str(error) or "no such file", str(self)) from error
        except Exception as error:
            raise OSError(f"{self} cannot be {deed}: {type(error).__name__}: {error}") from error

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self._store.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _make_folder(self) -> None:
        if not set(self._protocols) & set(_OBJECT_STORES):  # some would make a bucket
            self._store.makedirs(self.parent._path, exist_ok=True)

    def _at(self, path: str) -> StorePath:
        other = object.__new__(StorePath)
        other._store, other._path = self._store, path
        return other


Location = Path | StorePath


def location(text: str | os.PathLike[str]) -> Location:
    """The path or the path in a store that a text names."""
    name = os.fspath(text)
    protocol, mark, rest = name.partition(MARK)
    if not mark:
        return Path(name)
    return Path(rest) if protocol in LOCAL else StorePath(name)


def size_of(path: Location) -> int:
    """Bytes of a file. Raises FileNotFoundError if there is none."""
    return path.size() if isinstance(path, StorePath) else path.stat().st_size


def version_of(path: Location) -> list[int | str]:
    """Size of a file and its modification time, or what its store has in place of one: they change with the file."""
    if isinstance(path, StorePath):
        return [path.size(), path.version()]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def sample_of(path: Location, size: int) -> str:
    """SHA-256 of the first and the last 64 KiB of a file of `size` bytes: the same for copies on other machines."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def names_in(folder: Location) -> set[str]:
    """The names in a folder. Raises FileNotFoundError if there is none."""
    return set(folder.entries()) if isinstance(folder, StorePath) else set(os.listdir(folder))


def save_json(path: Location, data: Any) -> None:
    """Write JSON whole: readers see the old file or the new one. A missing folder is made."""
    if isinstance(path, StorePath):
        path.write_bytes(json_bytes(data))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, data)


def walk(root: Location, on_error: Callable[[OSError], Any]) -> Iterator[tuple[Location, list[str], list[str]]]:
    """Folders from `root` down with the names of their folders and files, as `os.walk`: folders that are removed from a
    list are not entered.
    """
    if isinstance(root, StorePath):
        entries = root.entries()
        folders = [name for name, is_folder in entries.items() if is_folder]
        yield root, folders, [name for name, is_folder in entries.items() if not is_folder]
        for name in folders:
            yield from walk(root / name, on_error)
    else:
        for at, folders, files in os.walk(root, onerror=on_error):
            yield Path(at), folders, files


def _open_store(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    protocol = url.partition(MARK)[0]
    try:
        if protocol in ("s3", "s3a"):
            require("s3", f"{protocol}{MARK}")  # fsspec would name the library, not the extra
        return url_to_fs(url)
    except MissingExtra:
        raise
    except (ImportError, ValueError) as error:  # of a library that is missing, or a protocol that nobody has
        raise ValueError(f"{url} cannot be opened: {error}; accepted: a path, or a URL that fsspec opens") from error
