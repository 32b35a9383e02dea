"""The plan of a `retnet data` run: sources to files, files to pieces, pieces to shards, before any text is read.

A shard is a task for one process: consecutive pieces of about the same total size. The plan depends on the sources and
settings alone, so any number of processes writes the same bytes, and an interrupted run knows what is missing. Big
files are cut between documents by reading a few bytes around each cut; compressed files are not cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retnet.data.shards import is_shard_folder, json_object
from retnet.data.sources import STDLIB, find_documents, is_compressed, suffix_of

HUB_PREFIX = "hf:"
MIN_SHARD, MAX_SHARD, SHARDS = 1 << 24, 1 << 29, 256
_LOOK = 1 << 16


@dataclass(frozen=True)
class Settings:
    """How documents are found in files.

    field: the field with the text in jsonl, parquet and datasets.
    separator: the text between documents of a text file; if None, a file is one document.
    config, split: of a dataset.
    """

    field: str = "text"
    separator: str | None = None
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Piece:
    """A part of a file that begins and ends between documents: bytes [begin, end) of text or jsonl, row groups of
    parquet, or rows of arrow.

    name: the file's path relative to the source's parent folder, the same on every machine.
    kind: text, jsonl, parquet or arrow.
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
    sources: Sequence[str],
    settings: Settings,
    shard_size: int | None = None,
    left_out: Counter[str] | None = None,
) -> list[list[Piece]]:
    """The pieces of each shard.

    sources: files, folders, `stdlib`, folders of `Dataset.save_to_disk`, or `hf:NAME` for a dataset of the hub.
    shard_size: approximate bytes of input per shard; if None, a 256th of the total, between 16 MiB and 512 MiB.
    left_out: a counter to which files left out are added (see `find_documents`).

    Raises FileNotFoundError if there is no such source, ValueError if there is no text in one.
    """
    files = [piece for source in sources for piece in _find_files(source, settings, left_out)]
    if shard_size is None:
        shard_size = min(max(sum(file.size for file in files) // SHARDS, MIN_SHARD), MAX_SHARD)
    shards: list[list[Piece]] = []
    room = 0
    for file in files:
        for piece in _cut(file, room if shards else shard_size, shard_size, settings.separator):
            if room <= 0:
                shards.append([])
                room = shard_size
            shards[-1].append(piece)
            room -= piece.size
    return shards


def describe_files(plan: Iterable[Iterable[Piece]]) -> dict[str, list[int]]:
    """Size and modification time of every file, which must not change between the parts of a resumed run."""
    paths = sorted({piece.path for pieces in plan for piece in pieces})
    return {path: [(stat := Path(path).stat()).st_size, stat.st_mtime_ns] for path in paths}


def _find_files(source: str, settings: Settings, left_out: Counter[str] | None) -> Iterator[Piece]:
    if source.startswith(HUB_PREFIX):
        yield from _hub_files(source.removeprefix(HUB_PREFIX), settings)
        return
    path = Path(source)
    if source != STDLIB and not path.exists():
        raise FileNotFoundError(
            f"no such file or folder: {path} (accepted: files, folders, {STDLIB!r}, {HUB_PREFIX}NAME for a dataset)"
        )
    if is_shard_folder(path):
        raise ValueError(f"{path} holds token shards already, which `retnet train` reads as they are")
    if _is_saved_dataset(path) or _splits(path):
        yield from _saved_dataset(path, settings.split)
        return
    for document in find_documents(source, unpack=True, left_out=left_out):
        base = path.name if path.is_dir() else ""
        name = f"{base or STDLIB}/{document.name}" if source == STDLIB or path.is_dir() else document.name
        yield from _whole_file(document.path, name, document.size)


def _whole_file(path: Path, name: str, size: int) -> Iterator[Piece]:
    """A file as one piece; parquet as one piece per row group."""
    kind = file_kind(path)
    if kind == "parquet":
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_metadata

        try:
            metadata = read_metadata(path)
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not parquet: {error}") from error
        row = 0
        for group in range(metadata.num_row_groups):
            entry = metadata.row_group(group)
            yield Piece(str(path), name, kind, group, group + 1, entry.total_byte_size, row)
            row += entry.num_rows
        return
    yield Piece(str(path), name, kind, 0, size, size)


def file_kind(path: Path) -> str:
    """The kind of a file, by its name."""
    plain = path.with_suffix("") if is_compressed(path) else path
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(suffix_of(plain), "text")


def _hub_files(name: str, settings: Settings) -> Iterator[Piece]:
    """The cached arrow files of a dataset of the hub, which is downloaded."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, settings.config, split=settings.split)
    except Exception as error:  # datasets and the hub raise many kinds
        raise FileNotFoundError(f"cannot load dataset {name}, split {settings.split}: {error}") from error
    files = [
        piece
        for number, file in enumerate(dataset.cache_files)
        for piece in _arrow_file(Path(file["filename"]), f"{name}/{settings.split}-{number:05}")
    ]
    if (rows := sum(file.end for file in files)) != dataset.num_rows:
        raise ValueError(
            f"split {settings.split!r} of {name} is {dataset.num_rows} of {rows} rows; accepted: a whole split, or a "
            "folder that `save_to_disk` wrote"
        )
    yield from files


def _saved_dataset(path: Path, split: str) -> Iterator[Piece]:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    if splits := _splits(path):
        if split not in splits:
            raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(splits)} (choose one with --split)")
        path = path / split
        if not _is_saved_dataset(path):
            raise ValueError(f"{path} is incomplete; accepted: a split that `save_to_disk` wrote")
    for file in json_object(path / "state.json")["_data_files"]:
        yield from _arrow_file(path / file["filename"], f"{path.name}/{file['filename']}")


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and "_data_files" in json_object(path / "state.json")


def _splits(path: Path) -> list[str]:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; empty for any other folder."""
    splits = json_object(path / "dataset_dict.json").get("splits")
    return splits if isinstance(splits, list) and all(isinstance(split, str) for split in splits) else []


def _arrow_file(path: Path, name: str) -> Iterator[Piece]:
    from pyarrow import ArrowInvalid, ipc, memory_map

    try:
        with memory_map(str(path)) as file:
            rows = sum(batch.num_rows for batch in ipc.open_stream(file))
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not an arrow stream: {error}") from error
    yield Piece(str(path), name, "arrow", 0, rows, path.stat().st_size)


def _cut(file: Piece, room: int, shard_size: int, separator: str | None) -> Iterator[Piece]:
    """A file in pieces: the first fills up the current shard, the others are whole shards."""
    if (
        file.size <= room
        or is_compressed(Path(file.path))
        or file.kind == "parquet"
        or (file.kind == "text" and separator is None)
    ):
        yield file
        return
    begin, want = file.begin, room if room > 0 else shard_size
    while begin < file.end:
        if file.kind == "arrow":
            rows = max(1, (file.end - file.begin) * want // file.size)
            end = min(file.end, begin + rows)
            size = file.size * (end - begin) // (file.end - file.begin)
        else:
            mark = b"\n" if file.kind == "jsonl" else (separator or "").encode()
            end = _after(Path(file.path), mark, begin, begin + want, file.end)
            size = end - begin
        yield replace(file, begin=begin, end=end, size=size, first_row=begin if file.kind == "arrow" else 0)
        begin, want = end, shard_size


def _after(path: Path, mark: bytes, begin: int, at: int, end: int) -> int:
    """The end of the first mark inside [begin, end) that ends at `at` or later; `end` if there is none.

    A mark that overlaps the one before it (in a run of line breaks) is skipped: whether it separates documents depends
    on the start of the run, and cuts must not change documents.
    """
    first = max(at - len(mark), begin)
    position = max(first - len(mark) + 1, begin)
    before = position - len(mark)  # start of the last mark
    window = b""
    with open(path, "rb") as file:
        file.seek(position)
        while block := file.read(_LOOK):
            window += block
            found = window.find(mark)
            while found >= 0:
                here = position + found
                if here >= first and here - before >= len(mark):
                    return min(here + len(mark), end)
                before, found = here, window.find(mark, found + 1)
            kept = min(len(mark) - 1, len(window))
            position, window = position + len(window) - kept, window[len(window) - kept :]
    return end
