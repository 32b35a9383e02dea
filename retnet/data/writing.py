"""Missing shards of a plan, written by one process or several, with their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retnet.data.plan import Piece, Settings, describe_files
from retnet.data.pool import ShardWriter, write_here, write_in_parallel
from retnet.data.readers import DataError
from retnet.data.shard_writer import Counts
from retnet.data.tokenizer import Tokenizer
from retnet.system.machine import usable_cores


@dataclass(frozen=True)
class Progress:
    """counts: so far, including the shards that were there. size: the total, in the unit of counts.size."""

    counts: Counts
    size: int


def write_missing(
    plan: Mapping[int, list[Piece]] | Sequence[list[Piece]],
    written: Mapping[int, Counts],
    settings: Settings,
    tokenizer: Tokenizer,
    tokenizer_directory: Path,
    write: ShardWriter,
    workers: int | None,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Write the shards of a plan that are not in `written`.

    tokenizer_directory: where `tokenizer` is saved, for worker processes. workers: processes; one per core if None.
    """
    shards = dict(plan) if isinstance(plan, Mapping) else dict(enumerate(plan))
    missing = {number: pieces for number, pieces in shards.items() if number not in written}
    counts = dict(written)
    size = sum(map(size_of_pieces, shards.values()))
    total = Counts.total(counts.values())

    def report(number: int, latest: Counts) -> None:
        nonlocal total
        total = Counts(*(t + new - old for t, new, old in zip(total, latest, counts.get(number, Counts()))))
        counts[number] = latest
        if on_progress:
            on_progress(Progress(total, size))

    if on_progress and total.size:
        on_progress(Progress(total, size))  # the part of an interrupted run
    count = min(workers or usable_cores(), len(missing))
    if count > 1:
        write_in_parallel(missing, settings, tokenizer.describe(), tokenizer_directory, write, count, report)
    else:
        write_here(missing, settings, tokenizer, write, report)


def size_of_pieces(pieces: Iterable[Piece]) -> int:
    """The size of a shard's input, in the unit of progress."""
    return sum(piece.size for piece in pieces)


def changed_files(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """The files whose description changed, as text; "" if none did."""
    changed = [path for path in before.keys() | now.keys() if before.get(path) != now.get(path)]
    return f"{min(changed)}{f' and {len(changed) - 1} more' if changed[1:] else ''}" if changed else ""


def check_unchanged(plan: Iterable[Iterable[Piece]], files: Mapping[str, object]) -> None:
    """Raise DataError for a source that changed while it was read: part of it may be missing.

    files: as `describe_files` found them before.
    """
    try:
        changed = changed_files(files, describe_files(plan))
    except OSError as error:
        raise DataError(f"{error.filename} disappeared while it was read: {error.strerror}") from error
    if changed:
        raise DataError(f"{changed} changed since the run began; accepted: files that nothing writes to")
