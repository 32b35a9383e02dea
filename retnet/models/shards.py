"""Sharded tensors: files of parts, and an index in JSON that says which part of which tensor is where.

    shards.json              {"format", "tensors": {name: {"dtype", "shape", "parts": [{"file", "offset", "shape"}]}}}
    shard-*-*.safetensors    parts that one process wrote, under the names of their tensors

`retnet.train` writes them through torch.distributed.checkpoint. Neither the index nor a part is a pickle, and all of it
is checked: files have names of one pattern and lie beside the index, the parts of a tensor cover it without overlap,
and the header of every file agrees with the index. So a tensor takes no more memory than its files have bytes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retnet.models.tensor_files import DTYPES, Tensors, open_safetensors, safetensors_stream
from retnet.system.checks import is_integer, quoted
from retnet.system.choices import is_choice
from retnet.system.files import read_json, write_json

SHARDS_FILE = "shards.json"
WEIGHTS = "weights."  # prefix of the names of a model's own tensors
_FORMAT = "retnet-shards-1"
_FILE = re.compile(r"shard-[0-9]{5}-[0-9]{5}\.safetensors")
_MOST_BYTES = 2**28  # of an index
_MOST_AXES, _MOST_PARTS = 16, 2**13  # of a tensor
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """A box of a tensor, from `offset` on, and the file that holds it."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.offset, self.shape, strict=True))

    def overlaps(self, other: Part) -> bool:
        return all(a < d and b < c for a, c, b, d in zip(self.offset, self.end, other.offset, other.end, strict=True))


@dataclass(frozen=True)
class ShardedTensor:
    """The dtype and shape of a tensor, and the parts that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def shard_file(process: int, number: int) -> str:
    """The name of the number-th file that a process writes."""
    return f"shard-{process:05d}-{number:05d}.safetensors"


def write_index(directory: Path, tensors: Mapping[str, ShardedTensor]) -> None:
    """Write the index atomically. Raises ValueError for one that `open_shards` would refuse."""
    entries = {
        name: {
            "dtype": dtype_name(name, x.dtype),
            "shape": list(x.shape),
            "parts": [{"file": p.file, "offset": list(p.offset), "shape": list(p.shape)} for p in x.parts],
        }
        for name, x in tensors.items()
    }
    _parsed(entries)
    write_json(directory / SHARDS_FILE, {"format": _FORMAT, "tensors": entries})


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors. Raises ValueError, which names the tensor, if it has none here."""
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"{name} is of {dtype}; accepted: {', '.join(map(str, _DTYPE_NAMES))}")
    return _DTYPE_NAMES[dtype]


def is_sharded(directory: Path) -> bool:
    """Whether a directory has an index of shards."""
    return (directory / SHARDS_FILE).is_file()


@dataclass(frozen=True)
class Shards:
    """The sharded tensors of a directory, not read yet."""

    directory: Path
    tensors: dict[str, ShardedTensor]

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        entry = self.tensors[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for part in entry.parts:
            with self.opened(part.file) as stream:
                whole[tuple(map(slice, part.offset, part.end))] = stream.get_tensor(name)
        return whole

    def opened(self, file: str) -> Any:
        """A context with the open file, for `read_box`."""
        return safetensors_stream(self.directory / file)

    def weights(self) -> Tensors:
        """The model's own tensors, under the names that they have in its file."""
        names = [name for name in self.tensors if name.startswith(WEIGHTS)]
        specs = {
            name: torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype, device="meta") for name in names
        }
        return Tensors(specs, self.read).renamed({name.removeprefix(WEIGHTS): name for name in names})


def open_shards(directory: Path) -> Shards:
    """The sharded tensors of a directory.

    Raises OSError if a file cannot be read, ValueError if the index or a file is damaged, or the two disagree.
    """
    index = directory / SHARDS_FILE
    size = index.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{index} has {size:,} bytes; accepted: {_MOST_BYTES:,} or fewer")
    data = read_json(index)
    try:
        if data.get("format") != _FORMAT or data.keys() != {"format", "tensors"}:
            raise ValueError(f"it is of format {quoted(data.get('format'))}; accepted: {_FORMAT}, with tensors alone")
        tensors = _parsed(data["tensors"])
    except ValueError as error:
        raise ValueError(f"{index} is no index of shards: {error}") from error
    _check_files(directory, tensors)
    return Shards(directory, tensors)


def read_box(stream: Any, name: str, offset: Iterable[int], shape: Iterable[int]) -> Tensor:
    """A box of the part that an open file has of a tensor; offset: from the beginning of the part."""
    box = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return stream.get_slice(name)[box] if box else stream.get_tensor(name)


def _check_files(directory: Path, tensors: Mapping[str, ShardedTensor]) -> None:
    """Raise an error unless every file holds the parts that the index says, and nothing else."""
    expected: defaultdict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = defaultdict(dict)
    for name, entry in tensors.items():
        for part in entry.parts:
            expected[part.file][name] = (entry.dtype, part.shape)
    for file, parts in expected.items():
        path = directory / file
        if not path.is_file():
            raise FileNotFoundError(f"{directory / SHARDS_FILE} names the file {file}, which is missing")
        held = {name: (x.dtype, tuple(x.shape)) for name, x in open_safetensors(path).specs.items()}
        if held != parts:
            name = min(n for n in held.keys() | parts.keys() if held.get(n) != parts.get(n))
            raise ValueError(
                f"{path} holds {_shown(held.get(name))} of {name}, and {SHARDS_FILE} says {_shown(parts.get(name))}"
            )


def _shown(part: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "nothing" if part is None else f"{part[0]} {list(part[1])}"


def _parsed(entries: Any) -> dict[str, ShardedTensor]:
    """The entries of an index. Raises ValueError with the tensor's name for one that is not as `write_index` wrote."""
    tensors = {}
    for name, entry in _mapping(entries, None).items():
        try:
            values = _mapping(entry, {"dtype", "shape", "parts"})
            if not is_choice(values["dtype"], DTYPES):
                raise ValueError(f"its dtype is {quoted(values['dtype'])}; accepted: {', '.join(DTYPES)}")
            if not isinstance(values["parts"], list) or len(values["parts"]) > _MOST_PARTS:
                raise ValueError(f"its parts are {quoted(values['parts'])}; accepted: a list of at most {_MOST_PARTS}")
            shape = _sizes("shape", values["shape"])
            parts = tuple(_part(part) for part in values["parts"])
            _check_cover(shape, parts)
        except ValueError as error:
            raise ValueError(f"{quoted(name)}: {error}") from error
        tensors[name] = ShardedTensor(DTYPES[values["dtype"]], shape, parts)
    return tensors


def _part(data: Any) -> Part:
    values = _mapping(data, {"file", "offset", "shape"})
    file = values["file"]
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise ValueError(f"a part is in the file {quoted(file)}; accepted: names like {shard_file(0, 0)}")
    offset, shape = _sizes("offset", values["offset"]), _sizes("shape", values["shape"])
    if len(offset) != len(shape) or not math.prod(shape):
        raise ValueError(f"a part has offset {list(offset)} and shape {list(shape)}; accepted: as many axes, not empty")
    return Part(file, offset, shape)


def _mapping(data: Any, keys: Iterable[str] | None) -> dict[str, Any]:
    if not isinstance(data, dict) or (keys is not None and data.keys() != set(keys)):
        raise ValueError(f"{quoted(data)} given; accepted: a mapping{'' if keys is None else f' of {sorted(keys)}'}")
    return data


def _sizes(what: str, values: Any) -> tuple[int, ...]:
    if (
        not isinstance(values, list)
        or len(values) > _MOST_AXES
        or not all(is_integer(n, 0, 2**62) for n in values)
        or math.prod(values) > 2**62
    ):
        raise ValueError(f"{what} {quoted(values)}; accepted: at most {_MOST_AXES} integers from 0 on")
    return tuple(values)


def _check_cover(shape: tuple[int, ...], parts: tuple[Part, ...]) -> None:
    """Raise ValueError unless every element of the tensor is in exactly one part."""
    for part in parts:
        if len(part.shape) != len(shape) or any(end > size for end, size in zip(part.end, shape, strict=True)):
            raise ValueError(f"the part {list(part.offset)} to {list(part.end)} is outside of the shape {list(shape)}")
    if len({part.file for part in parts}) < len(parts):
        raise ValueError("two parts are in one file; accepted: one part of a tensor per file")
    if parts and shape:  # a sweep along the axis that is cut most often
        axis = max(range(len(shape)), key=lambda i: len({part.offset[i] for part in parts}))
        active: list[Part] = []
        for part in sorted(parts, key=lambda part: part.offset[axis]):
            active = [other for other in active if other.end[axis] > part.offset[axis]]
            if any(part.overlaps(other) for other in active):
                raise ValueError(f"the part at {list(part.offset)} overlaps another")
            active.append(part)
    held, size = sum(math.prod(part.shape) for part in parts), math.prod(shape)
    if held != size:
        raise ValueError(f"its parts have {held} elements of {size}: a part is missing")
