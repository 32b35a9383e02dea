"""Files of named tensors, read one tensor at a time: names, shapes and dtypes are known without reading the data.

Reads safetensors and PyTorch's pickles (with `weights_only=True`), whole or in shards with an index. Writes safetensors
shards. A model may be larger than memory. `directory.py` gives the tensors of our models their meaning, `convert` those
of other formats.
"""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retnet.system.files import move_into_place, read_json, write_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2**30

# In the order of the search, which is that of transformers.
_KNOWN_FILES = (WEIGHTS_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
_PICKLES = (".bin", ".pt", ".pth")
DTYPES = {  # of safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, read when asked for. specs: each one's shape and dtype, as a tensor on the meta device.

    extra: other values in a pickled checkpoint, such as training arguments.
    """

    specs: dict[str, Tensor]
    read: Callable[[str], Tensor]
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor], extra: dict[str, Any] | None = None) -> Tensors:
        """Tensors that are in memory."""
        specs = {name: x.detach().to("meta") for name, x in state_dict.items()}
        return cls(specs, lambda name: state_dict[name].detach(), extra or {})

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The named tensors alone, under new names: new name -> old name."""
        return Tensors(
            {new: self.specs[old] for new, old in names.items()}, lambda name: self.read(names[name]), self.extra
        )

    def watched(self, on_bytes: Callable[[int, int], None]) -> Tensors:
        """The same tensors. on_bytes: gets the bytes read so far and those of all, after every tensor."""
        done = 0

        def read(name: str) -> Tensor:
            nonlocal done
            tensor = self.read(name)
            done += self.specs[name].nbytes
            on_bytes(done, self.nbytes)
            return tensor

        return Tensors(self.specs, read, self.extra)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.specs.values())


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a checkpoint: a directory of weight files, or one file.

    Raises FileNotFoundError if there are no weights, ValueError if a file is damaged, is a pickle of more than tensors
    and plain values, or does not hold what the index says.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_of(path)
    elif not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: no such file or directory")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    return _open_file(path)


def _weights_of(directory: Path) -> Path:
    """The file that holds a directory's weights, or their index."""
    for name in _KNOWN_FILES:
        if (directory / name).is_file():
            return directory / name
    others = sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", *_PICKLES) and p.is_file())
    if len(others) == 1:
        return others[0]
    found = ", ".join(p.name for p in others) or "none"
    raise FileNotFoundError(
        f"no weights in {directory}: accepted {', '.join(_KNOWN_FILES)}, or one other; found {found}"
    )


def _open_file(file: Path) -> Tensors:
    return _open_pickle(file) if file.suffix in _PICKLES else open_safetensors(file)


def open_safetensors(file: Path) -> Tensors:
    """The tensors of one safetensors file. Raises ValueError if it is damaged."""
    specs: dict[str, Tensor] = {}
    with safetensors_stream(file) as stream:
        for name in stream.keys():  # noqa: SIM118 (not a mapping)
            part = stream.get_slice(name)
            kind = part.get_dtype()
            if kind not in DTYPES:
                raise ValueError(f"{file}: {name} is of dtype {kind}; accepted: {', '.join(DTYPES)}")
            specs[name] = torch.empty(part.get_shape(), dtype=DTYPES[kind], device="meta")

    def read(name: str) -> Tensor:
        # A file opened anew for each tensor is unmapped with it: pages already read never add up to the whole file.
        with safetensors_stream(file) as stream:
            return stream.get_tensor(name)

    return Tensors(specs, read)


def safetensors_stream(file: Path) -> Any:
    """The open file, whose tensors are not read yet. Raises ValueError if it is damaged."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error


def _open_pickle(file: Path) -> Tensors:
    """A state dict alone, or under "model", "state_dict" or "module" beside other values."""
    whole = _unpickle(file)
    key = next((k for k in ("model", "state_dict", "module") if isinstance(whole.get(k), Mapping)), None)
    extra = {} if key is None else {k: v for k, v in whole.items() if k != key}
    state_dict = whole if key is None else whole[key]
    tensors = {name: x for name, x in state_dict.items() if isinstance(x, Tensor) and isinstance(name, str)}
    if len(tensors) < len(state_dict) or not tensors:
        other = next((name for name in state_dict if name not in tensors), None)
        raise ValueError(f"{file} holds no state dict: {'it is empty' if other is None else f'{other!r} is no tensor'}")
    if not zipfile.is_zipfile(file):  # from before PyTorch 1.6: not mapped, all of it is in memory already
        return Tensors.of(tensors, extra)

    def read(name: str) -> Tensor:
        again = _unpickle(file)
        return (again if key is None else again[key])[name]

    return Tensors({name: x.to("meta") for name, x in tensors.items()}, read, extra)


def _unpickle(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values under names: torchscale's arguments
            whole = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        raise ValueError(
            f"{file} is damaged, or a pickle of more than tensors and plain values, which could run code and is not "
            f"read: {str(error).partition(chr(10))[0] or type(error).__name__}"
        ) from error
    if not isinstance(whole, dict):
        raise ValueError(f"{file} holds a {type(whole).__name__}; accepted: a state dict")
    return whole


def _open_shards(index_file: Path) -> Tensors:
    try:
        weight_map = read_json(index_file)["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_file} is no index of shards (a mapping with weight_map): {error!r}") from error
    shards: dict[str, Tensors] = {}
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
            raise ValueError(f"{index_file} names the shard {name!r}; accepted: a file beside it")
        file = index_file.parent / name
        if not file.is_file():
            raise FileNotFoundError(f"{index_file} names the shard {name}, which is missing")
        shards[name] = _open_file(file)
    held = {tensor: name for name, shard in shards.items() for tensor in shard.specs}
    if held != weight_map:
        wrong = sorted(t for t in held.keys() | weight_map.keys() if held.get(t) != weight_map.get(t))
        raise ValueError(f"{index_file} and its shards disagree on where {len(wrong)} tensors are, {wrong[0]} for one")
    return Tensors(
        {tensor: shards[name].specs[tensor] for tensor, name in weight_map.items()},
        lambda tensor: shards[weight_map[tensor]].read(tensor),
    )


def write_tensors(directory: Path, tensors: Tensors, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors, in shards with an index if they exceed `shard_bytes`; one shard is in memory at a time.

    Shards get their names once all are complete, so that a failed save leaves the old files. Weights of an earlier save
    in the directory are removed.
    """
    shards = list(_shards(tensors, shard_bytes))
    files = [WEIGHTS_FILE] if len(shards) == 1 else [_shard_file(i, len(shards)) for i in range(len(shards))]
    staged = [directory / (file + ".part") for file in files]
    try:
        for part, names in zip(staged, shards):
            shard = {name: tensors.read(name).cpu().contiguous() for name in names}
            part.touch()
            mode = part.stat().st_mode
            save_file(shard, part, metadata={"format": "pt"})
            part.chmod(mode)  # safetensors leaves a file that its owner alone may read
            del shard  # before the next one is read
        for part, file in zip(staged, files):
            move_into_place(part, directory / file)
    finally:
        for part in staged:
            part.unlink(missing_ok=True)
    for stale in [*directory.glob("model-*-of-*.safetensors"), directory / WEIGHTS_FILE, directory / INDEX_FILE]:
        if stale.name not in files:
            stale.unlink(missing_ok=True)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": tensors.nbytes}, "weight_map": weight_map}
        write_json(directory / INDEX_FILE, index)


def _shard_file(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut where a shard would pass `shard_bytes`; a larger tensor is a shard of its own."""
    names: list[str] = []
    size = 0
    for name, spec in tensors.specs.items():
        if names and size + spec.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += spec.nbytes
    yield names


def read_all(
    tensors: Tensors,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    wide: Collection[str] = (),
) -> dict[str, Tensor]:
    """Every tensor in memory of its own, on `device`, floating-point ones in `dtype` (their own if None).

    wide: last parts of the names of tensors that half precision leaves in float32.
    """

    def cast(name: str, spec: Tensor) -> torch.dtype | None:
        if dtype is None or not spec.is_floating_point():
            return None
        return torch.promote_types(dtype, torch.float32) if name.rpartition(".")[2] in wide else dtype

    return {name: tensors.read(name).to(device, cast(name, spec), copy=True) for name, spec in tensors.specs.items()}
