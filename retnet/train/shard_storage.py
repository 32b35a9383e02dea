"""Storage of torch.distributed.checkpoint: safetensors files with an index in JSON (`retnet.models.shards`).

torch's own storages do not serve a training run. `FileSystemReader` unpickles its index. `HuggingFaceStorageWriter`
writes safetensors without an index: shapes are guessed from the parts that are found, so a missing part is a smaller
tensor, and values that are not tensors spoil its files.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from retnet.models.shards import Part, ShardedTensor, Shards, read_box, shard_file, write_index
from retnet.models.tensor_files import SHARD_BYTES
from retnet.system.files import flush, hash_file


class Written(NamedTuple):
    """A part on the disk, and the SHA-256 of its file."""

    part: Part
    sha256: str


class ShardWriter(StorageWriter):
    """Writes tensors into a folder that exists. Every process calls `torch.distributed.checkpoint.save` with one.

    finished: called in the first process after all processes have written their files and the index is written, with
    the SHA-256 of every file.
    """

    def __init__(self, folder: Path, finished: Callable[[dict[str, str]], None]):
        self.folder, self.finished = folder, finished

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: processes are numbered in `prepare_global_plan`."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=process) for process, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_bounded(plan.items)):
            results += self._write_file(shard_file(plan.storage_data, number), items, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(self, file: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        tensors: dict[str, Tensor] = {}
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            tensors[item.index.fqn] = tensor.detach().cpu().contiguous()
        path = self.folder / file
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path)
        path.chmod(mode)  # safetensors leaves a file that its owner alone may read
        flush(path)
        sha256 = hash_file(path)
        return [
            WriteResult(item.index, tensors[item.index.fqn].nbytes, Written(_part(file, item), sha256))
            for item in items
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        parts: defaultdict[str, list[Part]] = defaultdict(list)
        hashes = {}
        for result in (each for process in results for each in process):
            written: Written = result.storage_data
            parts[result.index.fqn].append(written.part)
            hashes[written.part.file] = written.sha256
        tensors = {}
        for name, data in metadata.state_dict_metadata.items():
            assert isinstance(data, TensorStorageMetadata)
            tensors[name] = ShardedTensor(data.properties.dtype, tuple(data.size), tuple(parts[name]))
        write_index(self.folder, tensors)
        self.finished(hashes)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)


def _bounded(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Items in files of at most SHARD_BYTES, or of one part, one part of a tensor per file, no empty parts."""
    batch: dict[str, WriteItem] = {}
    size = 0
    for item in items:
        assert item.type != WriteItemType.BYTE_IO
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        if not chunk.sizes.numel():
            continue
        nbytes = chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        if batch and (size + nbytes > SHARD_BYTES or item.index.fqn in batch):
            yield list(batch.values())
            batch, size = {}, 0
        batch[item.index.fqn] = item
        size += nbytes
    if batch:
        yield list(batch.values())


def _part(file: str, item: WriteItem) -> Part:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Part(file, tuple(chunk.offsets), tuple(chunk.sizes))


class ShardReader(StorageReader):
    """Reads what the processes of any number need of opened shards."""

    def __init__(self, shards: Shards):
        self.shards = shards

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing: a reader serves one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _storage_metadata(x) for name, x in self.shards.tensors.items()}, storage_data={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the shards know where their parts are."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = {
            MetadataIndex(name, part.offset): part.file for name, x in self.shards.tensors.items() for part in x.parts
        }
        items: defaultdict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            items[files[item.storage_index]].append(item)
        for file, each in items.items():
            with self.shards.opened(file) as stream:
                for item in each:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(read_box(stream, item.storage_index.fqn, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)


def _storage_metadata(x: ShardedTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(Size(part.offset), Size(part.shape)) for part in x.parts]
    return TensorStorageMetadata(TensorProperties(dtype=x.dtype), Size(x.shape), chunks)
