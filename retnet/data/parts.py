"""Parts: a share of a plan's shards, which any process on any machine writes.

    OUT.parts/plan.json            what is written (see `part_plan`): every part compares it with its own
    OUT.parts/records/00003.json   a finished shard: its plan, and the sizes and SHA-256 of its files
    OUT.parts/data/                the shards, where OUT is on this machine; in a store they are in OUT itself

Part k of n writes shards k - 1, k - 1 + n, k - 1 + 2 n, ... Each shard has the same bytes whoever writes it, its files
appear whole, and its record is written last. So parts run in any order, at the same time, twice, or again after they
were killed, and n may change in between. `merge` makes the shards a corpus.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet.data.output import check_new, check_outside, real_path
from retnet.data.part_plan import ASPECTS, FORMAT, VERSION, describe_plan, differences, identity_of
from retnet.data.plan import Piece, Settings, describe_files, make_plan
from retnet.data.shard_writer import Counts, write_shard
from retnet.data.shards import MANIFEST, SUFFIXES, TOKENIZER
from retnet.data.sources import PathsByKind
from retnet.data.stores import Location, StorePath, location, names_in, save_json, size_of
from retnet.data.tokenizer import BYTES, Tokenizer
from retnet.data.tokenizer_json import find_tokenizer
from retnet.data.writing import Progress, check_unchanged, size_of_pieces, write_missing
from retnet.system.files import hash_file, read_json, written_whole

PARTS = ".parts"
_SHARD_FILE = re.compile(rf"\d{{5,}}\.({'|'.join(SUFFIXES)})")


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """A part as `k/n`. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.number <= part.of:
            raise ValueError(f"--shard is {text!r}; accepted: k/n with 1 <= k <= n, such as 2/8")
        return part


@dataclass(frozen=True)
class PartResult:
    """Shards of a part, and of all parts. written: by this call; the others were there."""

    shards: int
    written: int
    all_shards: int
    counts: Counts


class PartsFolder:
    """The places of the parts of a corpus. out: the corpus that they become."""

    def __init__(self, out: str | Location):
        self.out = location(out) if isinstance(out, str) else out
        if isinstance(self.out, Path):
            self.out = real_path(self.out)  # through links, so that OUT.parts is on the same disk
        self.folder: Location = self.out.with_name(self.out.name + PARTS)
        self.data: Location = self.out if isinstance(self.out, StorePath) else self.folder / "data"
        self.plan: Location = self.folder / "plan.json"
        self.records: Location = self.folder / "records"

    def record(self, number: int) -> Location:
        """The file that says that a shard is finished."""
        return self.records / f"{number:05}.json"

    def read_record(self, number: int) -> dict[str, Any] | None:
        """The record of a shard; None without one. Raises ValueError for a file that is none."""
        path = self.record(number)
        if not path.is_file():
            return None
        record = read_json(path)
        tables = [record.get(key) for key in ("plan", "size", "sha256")]
        whole = all(isinstance(record.get(key), int) for key in ("documents", "tokens"))
        whole = whole and all(isinstance(table, dict) for table in tables)
        if not whole or any(record[key].keys() != set(SUFFIXES) for key in ("size", "sha256")):
            raise ValueError(f"{path} is not the record of a shard; accepted: records that `retnet data` wrote")
        return record

    def files(self, number: int) -> dict[str, Location]:
        """The files of a shard, by suffix."""
        return {suffix: self.data / f"{number:05}.{suffix}" for suffix in SUFFIXES}

    def read_plan(self) -> dict[str, Any] | None:
        """The description of the plan that is being written; None if no part has begun."""
        if not self.plan.is_file():
            return None
        plan = read_json(self.plan)
        if (kind := (plan.get("format"), plan.get("version"))) != (FORMAT, VERSION):
            raise ValueError(f"{self.plan} is {kind[0]} version {kind[1]}; accepted: {FORMAT} version {VERSION}")
        missing = [key for key in (*ASPECTS, "shards") if key not in plan]
        if missing:
            raise ValueError(f"{self.plan} has no {missing[0]!r}; accepted: a plan that `retnet data` wrote")
        return plan

    def check_data(self, shards: int | None = None) -> None:
        """Raise ValueError for a file among the shards that is none, or whose number is not below `shards`."""
        try:
            names = names_in(self.data)
        except FileNotFoundError:
            return
        if MANIFEST in names and self.data is self.out:
            raise ValueError(f"{self.out} exists; accepted: a new folder")
        for name in sorted(names - {TOKENIZER, MANIFEST}):
            if name.startswith("."):  # of a process that was killed, or is writing
                continue
            number = int(name.partition(".")[0]) if _SHARD_FILE.fullmatch(name) else None
            if number is None or (shards is not None and number >= shards):
                raise ValueError(f"{self.data} holds {name}, which is none of the shards of these parts; remove it")


def write_part(
    sources: Sequence[str],
    out: str,
    part: Part,
    *,
    tokenizer: str = BYTES,
    document_start: str | None = None,
    with_end: bool = False,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    shard_size: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> PartResult:
    """Write the shards of a part that are not there. The other arguments are those of `build_shards`.

    out: a path, or the URL of a folder in a store.

    Raises as `build_shards` does, and ValueError if other parts are written by another plan.
    """
    parts = PartsFolder(out)
    if isinstance(parts.out, Path):
        check_new(parts.out)
    check_outside(parts.out, sources)
    found = find_tokenizer(tokenizer, document_start, with_end=with_end)
    left_out = PathsByKind()
    plan = make_plan(sources, settings, shard_size, left_out)
    mine = {number: plan[number] for number in range(part.number - 1, len(plan), part.of)}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / TOKENIZER
        found.save(directory)
        description = describe_plan(sources, plan, settings, found, directory, left_out)
        _begin(parts, description, directory)
        identity = identity_of(description)
        written = _written(parts, mine, identity)
        missing = [pieces for number, pieces in mine.items() if number not in written]
        write = _PartWriter(str(parts.out), identity, describe_files(missing))
        stores = [place for place in map(location, (*sources, out)) if isinstance(place, StorePath)]
        alone = any(store.is_per_process for store in stores)
        write_missing(mine, written, settings, found, directory, write, 1 if alone else workers, on_progress)
    counts = _written(parts, mine, identity).values()
    return PartResult(len(mine), len(missing), len(plan), Counts.total(counts))


@dataclass(frozen=True)
class _PartWriter:
    """Writes a shard and then its record. identity: of the plan. files: versions of the sources when it was made."""

    out: str
    identity: Mapping[str, str]
    files: Mapping[str, object]

    def __call__(
        self,
        number: int,
        pieces: Sequence[Piece],
        settings: Settings,
        tokenizer: Tokenizer,
        *,
        report: Callable[[Counts], None],
    ) -> None:
        parts = PartsFolder(self.out)
        with _folder_to_write(parts) as directory:
            write_shard(number, pieces, settings, tokenizer, directory, report)
            check_unchanged([pieces], {piece.path: self.files[piece.path] for piece in pieces})
            files = {suffix: directory / target.name for suffix, target in parts.files(number).items()}
            shard = read_json(files["json"])
            record = {
                "plan": dict(self.identity),
                "documents": shard["documents"],
                "tokens": shard["tokens"],
                "size": {suffix: file.stat().st_size for suffix, file in files.items()},
                "sha256": {**shard["sha256"], "json": hash_file(files["json"])},
            }
            for suffix, target in parts.files(number).items():
                if isinstance(target, StorePath):
                    target.upload(files[suffix])
        save_json(parts.record(number), record)


@contextmanager
def _folder_to_write(parts: PartsFolder) -> Iterator[Path]:
    """Where shards are written: their folder, or a temporary one before they go to a store."""
    if isinstance(parts.data, Path):
        yield parts.data
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def _begin(parts: PartsFolder, description: dict[str, Any], tokenizer: Path) -> None:
    """Write the plan and the tokenizer; or compare the plan with the one that is there."""
    before = parts.read_plan()
    if before is not None and (other := differences(before, description)):
        raise ValueError(
            f"{parts.folder} holds parts of another plan: other {other}; accepted: the arguments of those parts, or "
            "remove the folder to start again"
        )
    parts.check_data(description["shards"])
    if isinstance(parts.data, Path):
        parts.data.mkdir(parents=True, exist_ok=True)
    for name in description["tokenizer_files"]:
        _copy_whole(tokenizer / name, parts.data / TOKENIZER, name)
    if before is None:
        save_json(parts.plan, description)


def _copy_whole(file: Path, folder: Location, name: str) -> None:
    """Copy a small file into a folder, below which `name` is its path; readers see all of it or nothing."""
    if isinstance(folder, StorePath):
        (folder / name).upload(file)
        return
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / name) as copy:
        copy.write(file.read_bytes())


def _written(parts: PartsFolder, mine: Mapping[int, list[Piece]], identity: Mapping[str, str]) -> dict[int, Counts]:
    """The counts of the finished shards of this plan whose files are there."""
    counts = {}
    for number, pieces in mine.items():
        record = parts.read_record(number)
        if record is not None and record["plan"] == identity and _has_files(parts, number, record):
            counts[number] = Counts(size_of_pieces(pieces), record["documents"], record["tokens"])
    return counts


def _has_files(parts: PartsFolder, number: int, record: Mapping[str, Any]) -> bool:
    files = parts.files(number)
    return all(file.is_file() and size_of(file) == record["size"][suffix] for suffix, file in files.items())
