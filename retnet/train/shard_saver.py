"""Saves of sharded checkpoints: at once, or in the background while training goes on.

A background save first copies the process's share to the host. Its thread writes the copy, waits for those of all
processes, and then the first process renames the folder (`checkpoints.commit`). The copy is kept for the next save.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from retnet.train.shard_storage import ShardWriter


class ShardSaver:
    """Saves one checkpoint at a time. All processes make one and call `save` at the same points.

    background: write in a thread. timeout: seconds that processes wait for each other in it.
    """

    def __init__(self, background: bool, timeout: float):
        self._several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # Collectives of the thread must not mix with those of training, and may not need a GPU.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if self._several else None
        self._stager: DefaultStager | None = None
        if background:
            is_cuda = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=is_cuda,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=is_cuda,
                )
            )
        self._saving: Future | None = None
        if not self._several:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    @property
    def pending(self) -> bool:
        """Whether a background save was begun and not collected. Equal in all processes."""
        return self._saving is not None

    @property
    def done(self) -> bool:
        """Whether the background save of this process has ended, well or not."""
        return self._saving is not None and self._saving.done()

    def save(self, folder: Path, tensors: dict[str, Tensor], finished: Callable[[dict[str, str]], None]) -> None:
        """Write this process's share of the tensors, as `sharded_state.own_share` gives it, with an index.

        finished: called in the first process once every file of every process is on the disk, with their SHA-256. A
        background save returns before that; `collect` ends it. Raises what the storage raises.
        """
        assert not self.pending
        options = {
            "storage_writer": ShardWriter(folder, finished),
            "planner": DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            "process_group": self._group,
            "no_dist": not self._several,
        }
        if self._stager is None:
            dcp.save(tensors, **options)
        else:
            saving = dcp.async_save(tensors, **options, async_stager=self._stager)
            assert isinstance(saving, Future)
            self._saving = saving

    def collect(self) -> None:
        """Wait for the background save, if there is one, and raise its error. All processes call this together."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait for the thread of a run that has failed, which has an error of its own to show."""
        if self._saving is not None:
            wait([self._saving])
        if self._stager is not None:
            self._stager.close()
