"""The plan of a `retnet data` run: sources to files, files to pieces, pieces to shards, before any text is read.

A shard is a task for one process: consecutive pieces of about the same total size. The plan depends on the sources and
settings alone, so any number of processes writes the same bytes, and an interrupted run knows what is missing. Big
files are cut between documents by reading a few bytes around each cut; compressed files are not cut.
"""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retnet.data.blocks import Separator
from retnet.data.compression import ZSTANDARD, ZSTANDARD_FILE, is_compressed, suffix_of, unpacked
from retnet.data.kinds import DEFAULT_FIELD, INFO, RECORDS, STATE, Kind, json_object, splits_of
from retnet.data.sources import STDLIB, PathsByKind, Source, SourceFile, SourceWarning, by_kind, find_source
from retnet.data.stores import Location, StorePath, location, size_of, version_of
from retnet.system.extras import needs, require

HUB_PREFIX = "hf:"
DEFAULT_SPLIT = "train"
TABLES = "A parquet or arrow file"  # in the error of a missing library
MIN_SHARD, MAX_SHARD, SHARDS = 1 << 24, 1 << 29, 256
_LOOK = 1 << 16
_LINE_BREAK = Separator("\n")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of arrow


@dataclass(frozen=True)
class Settings:
    """How documents are found in files.

    field: the field with the text in jsonl, json, parquet and datasets; if None, `text`.
    separator: the text between documents of a text file (see `Separator`); if None, a file is one document.
    config, split: of a dataset; if None, its default and `train`.
    """

    field: str | None = None
    separator: str | None = None
    config: str | None = None
    split: str | None = None

    @property
    def text_field(self) -> str:
        return DEFAULT_FIELD if self.field is None else self.field

    @property
    def cut(self) -> Separator | None:
        return None if self.separator is None else Separator(self.separator)


@dataclass(frozen=True)
class Piece:
    """A part of a file that begins and ends between documents: bytes [begin, end) of text, jsonl or json, row groups
    of parquet, or rows of arrow.

    name: the file's path relative to the source's parent folder, the same on every machine.
    kind: one of `kinds.READ`.
    size: bytes on disk or of the rows; the unit of progress.
    first_row: number of the first row, for parquet and arrow.
    """

    path: str
    name: str
    kind: str
    begin: int
    end: int
    size: int
    first_row: int = 0


def make_plan(
    sources: Sequence[str], settings: Settings, shard_size: int | None = None, left_out: PathsByKind | None = None
) -> list[list[Piece]]:
    """The pieces of each shard.

    sources: files, folders, `stdlib`, folders of `save_to_disk`, or `hf:NAME` for a dataset of the hub.
    shard_size: approximate bytes of input per shard; if None, a 256th of the total, between 16 MiB and 512 MiB.
    left_out: to which paths left out are added (see `find_source`).

    Warns (`SourceWarning`) about paths left out, text files beside files of records, which are documents too, and text
    without the separator.

    Raises FileNotFoundError if there is no such source, ValueError if there is no text in one, and for settings that no
    source uses.
    """
    files = [piece for source in sources for piece in _find_files(source, settings, left_out)]
    _check_settings(files, sources, settings)
    if shard_size is None:
        shard_size = min(max(sum(file.size for file in files) // SHARDS, MIN_SHARD), MAX_SHARD)
    shards: list[list[Piece]] = []
    room = 0
    for file in files:
        for piece in _cut(file, room if shards else shard_size, shard_size, settings.cut):
            if room <= 0:
                shards.append([])
                room = shard_size
            shards[-1].append(piece)
            room -= piece.size
    return shards


def _check_settings(files: Sequence[Piece], sources: Sequence[str], settings: Settings) -> None:
    """Raise ValueError for settings that no source uses; warn about text files that the separator does not cut."""
    found = PathsByKind()
    for file in files:
        found.add(f"{file.kind} file", file.name)
    texts = [file for file in files if file.kind == Kind.TEXT]
    from_hub = any(source.startswith(HUB_PREFIX) for source in sources)
    for option, value, used, where in (
        ("field", settings.field, len(texts) < len(files), "jsonl, json, parquet and datasets"),
        ("separator", settings.separator, bool(texts), "text files"),
        ("config", settings.config, from_hub, f"{HUB_PREFIX}NAME"),
        ("split", settings.split, any(file.kind == Kind.ARROW for file in files), "datasets"),
    ):
        if value is not None and not used:
            raise ValueError(f"{option} is {value!r}, and nothing here has one: {found}; accepted for: {where}")
    if settings.cut is not None:
        uncut = [file for file in texts if not _occurs(settings.cut, file)]
        if uncut:
            names = PathsByKind()
            for file in uncut:
                names.add("text file", file.name)
            message = f"separator {settings.separator!r} is not in {names}: one document each"
            warnings.warn(message, SourceWarning, stacklevel=3)


def _occurs(separator: Separator, file: Piece) -> bool:
    path, rest = location(file.path), b""
    with path.open("rb") as raw, unpacked(raw, path) as text:
        while chunk := text.read(_LOOK):
            rest = rest[-separator.longest :] + chunk
            if separator.pattern.search(rest):
                return True
    return False


def describe_files(plan: Iterable[Iterable[Piece]]) -> dict[str, list[int | str]]:
    """Size and modification time of every file, which must not change between the parts of a resumed run."""
    paths = {path: location(path) for path in sorted({piece.path for pieces in plan for piece in pieces})}
    for path in paths.values():
        if isinstance(path, StorePath):
            path.refresh()
    return {name: version_of(path) for name, path in paths.items()}


def _find_files(source: str, settings: Settings, left_out: PathsByKind | None) -> Iterator[Piece]:
    if source.startswith(HUB_PREFIX):
        yield from _hub_files(source.removeprefix(HUB_PREFIX), settings)
        return
    zeros = settings.separator is not None and "\0" in settings.separator
    found, path = find_source(source, settings.field, zeros=zeros), location(source)
    found.warn()
    if left_out is not None:
        left_out.update(found.left_out)
    if found.kind is Kind.SHARDS:
        found.refuse("text; `retnet train` and `retnet eval --data` read token shards as they are")
    if found.kind is not Kind.TEXT:
        yield from _saved_dataset(path, found.kind, settings.split)
        return
    _warn_of_text_beside_records(found)
    folder = STDLIB if source == STDLIB else path.name if path.is_dir() else ""
    for file in found.files:
        yield from _whole_file(file, f"{folder}/{file.name}" if folder else file.name)


def _warn_of_text_beside_records(found: Source) -> None:
    texts = [file for file in found.files if file.kind is Kind.TEXT]
    if texts and any(file.kind in RECORDS for file in found.files):
        message = f"{found.name} holds {by_kind(found.files)}; each text file is a document too"
        warnings.warn(message, SourceWarning, stacklevel=3)


def _whole_file(file: SourceFile, name: str) -> Iterator[Piece]:
    """A file as one piece; parquet as one piece per row group."""
    if file.kind is Kind.ARROW:
        yield from _arrow_file(file.path, name)
    elif file.kind is Kind.PARQUET:
        with needs("train", TABLES):
            from pyarrow import ArrowException
            from pyarrow.parquet import read_metadata

        try:
            with file.path.open("rb") as raw:  # pyarrow takes no path that is not UTF-8
                metadata = read_metadata(raw)
        except (ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk, not of the data
                raise
            raise ValueError(f"{file.path} is not parquet: {error}") from error
        row = 0
        for group in range(metadata.num_row_groups):
            entry = metadata.row_group(group)
            yield Piece(str(file.path), name, file.kind, group, group + 1, entry.total_byte_size, row)
            row += entry.num_rows
    else:
        if suffix_of(file.path) == ZSTANDARD:  # read in another process, whose errors are bugs
            require("train", ZSTANDARD_FILE, "pyarrow")
        yield Piece(str(file.path), name, file.kind, 0, file.size, file.size)


def _hub_files(name: str, settings: Settings) -> Iterator[Piece]:
    """The cached arrow files of a dataset of the hub, which is downloaded."""
    with needs("train", "A dataset of the hub"):
        from datasets import load_dataset

    split = DEFAULT_SPLIT if settings.split is None else settings.split
    try:
        dataset = load_dataset(name, settings.config, split=split)
    except Exception as error:  # datasets and the hub raise many kinds
        raise FileNotFoundError(f"cannot load dataset {name}, split {split}: {error}") from error
    files = [
        piece
        for number, file in enumerate(dataset.cache_files)
        for piece in _arrow_file(Path(file["filename"]), f"{name}/{split}-{number:05}")
    ]
    if (rows := sum(file.end for file in files)) != dataset.num_rows:
        raise ValueError(
            f"split {split!r} of {name} is {dataset.num_rows} of {rows} rows; accepted: a whole split, or a "
            "folder that `save_to_disk` wrote"
        )
    yield from files


def _saved_dataset(path: Location, kind: Kind, split: str | None) -> Iterator[Piece]:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    if kind is Kind.DATASETS:
        splits, split = splits_of(path), DEFAULT_SPLIT if split is None else split
        if split not in splits:
            raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(splits)} (choose one with --split)")
        path = path / split
    elif split is not None:
        raise ValueError(f"split is {split!r}, and {path} is one dataset without splits; accepted: no split")
    files = json_object(path / STATE).get("_data_files")
    names = [file.get("filename") if isinstance(file, dict) else None for file in files or []]
    if not (path / INFO).is_file() or not isinstance(files, list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{path} is incomplete; accepted: a dataset or a split that `save_to_disk` wrote")
    for name in names:
        yield from _arrow_file(path / str(name), f"{path.name}/{name}")


def _arrow_file(path: Location, name: str) -> Iterator[Piece]:
    with needs("train", TABLES):
        from pyarrow import ArrowException, ipc

    try:
        with path.open("rb") as file:
            rows = sum(batch.num_rows for batch in ipc.open_stream(file))
            end = file.tell()
            file.seek(-len(_END_OF_STREAM), 2)
            whole = file.read() == _END_OF_STREAM and file.tell() == end
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # of the disk; EINVAL: shorter than its end
            raise
        raise ValueError(f"{path} is not an arrow stream, as `save_to_disk` writes: {error}") from error
    if not whole:
        raise ValueError(f"{path} is damaged or cut off: it does not end where its arrow stream ends")
    yield Piece(str(path), name, Kind.ARROW, 0, rows, size_of(path))


def _cut(file: Piece, room: int, shard_size: int, separator: Separator | None) -> Iterator[Piece]:
    """A file in pieces: the first fills up the current shard, the others are whole shards."""
    if (
        file.size <= room
        or is_compressed(location(file.path))
        or file.kind in (Kind.PARQUET, Kind.JSON)
        or (file.kind == Kind.TEXT and separator is None)
    ):
        yield file
        return
    begin, want = file.begin, room if room > 0 else shard_size
    while begin < file.end:
        if file.kind == Kind.ARROW:
            rows = max(1, (file.end - file.begin) * want // file.size)
            end = min(file.end, begin + rows)
            size = file.size * (end - begin) // (file.end - file.begin)
        else:
            mark = _LINE_BREAK if separator is None or file.kind == Kind.JSONL else separator
            end = _after(location(file.path), mark.pattern, mark.longest, begin, begin + want, file.end)
            size = end - begin
        yield replace(file, begin=begin, end=end, size=size, first_row=begin if file.kind == Kind.ARROW else 0)
        begin, want = end, shard_size


def _after(path: Location, mark: re.Pattern[bytes], longest: int, begin: int, at: int, end: int) -> int:
    """The end of the first mark inside [begin, end) that ends at `at` or later; `end` if there is none.

    longest: bytes of the longest mark. A mark that overlaps one before it (in a run of line breaks) is skipped: whether
    it separates documents depends on the start of the run, and cuts must not change documents.
    """
    overlapping = re.compile(rb"(?=(" + mark.pattern + rb"))")
    position = max(at - 2 * longest, begin)  # a mark that ends at `at` or later overlaps none from before here
    before = position  # the end of the marks so far
    window = b""
    with path.open("rb") as file:
        file.seek(position)
        while block := file.read(_LOOK):
            window += block
            for match in overlapping.finditer(window):
                first, last = position + match.start(1), position + match.end(1)
                if last >= at and first >= before:
                    return min(last, end)
                before = max(before, last)
            kept = min(longest - 1, len(window))
            position, window = position + len(window) - kept, window[len(window) - kept :]
    return end
