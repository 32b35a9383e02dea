"""Processes that evaluate one model together, as torchrun and `accelerate launch` start them.

The work is split into consecutive shares of about equal cost. Every process gets all results, in the order of one
process, so whatever is computed from them is the same everywhere, sums included. Results travel as JSON, which keeps
every bit of a float, through a group on gloo; the model may be on any device.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from retnet.system.lost_process import lost_process_named

_PATIENCE = timedelta(days=2)  # how long the first to finish waits for the others


class SharedError(ValueError):
    """An error in the work of one process, which all of them raise."""


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `count`. local_rank: among those of its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process, where `auto` and `cuda` mean a GPU of its own.

        Raises ValueError if there are more processes than GPUs on this machine.
        """
        if self.count == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.local_rank + 1} of this machine has no GPU of its own, as there are "
                f"{torch.cuda.device_count()}; accepted: one process per GPU at most, or --device cpu"
            )
        return f"cuda:{self.local_rank}"

    def share(self, costs: Sequence[float]) -> range:
        """The items of this process: the shares of all are consecutive, and their costs about equal."""
        ends = list(accumulate(costs))
        total = ends[-1] if ends else 0
        cuts = [bisect_left(ends, total * k / self.count) for k in range(1, self.count)]
        bounds = [0, *cuts, len(ends)]
        return range(bounds[self.rank], bounds[self.rank + 1])

    def run(self, costs: Sequence[float], work: Callable[[range], list[Any]]) -> list[Any]:
        """The results of all items, in their order, in every process.

        costs: of the items, in any unit; the same in every process.
        work: gets the items of this process, and returns one result per item, made of numbers, texts, lists and None.

        Raises SharedError for a ValueError or an OSError in the work of any process.
        """
        if self.count == 1:
            return work(range(len(costs)))
        try:
            answer: dict[str, Any] = {"results": work(self.share(costs))}
        except (ValueError, OSError) as error:
            answer = {"error": str(error)}
        answers = _gather(answer)
        failed = [answer["error"] for answer in answers if "error" in answer]
        if failed:
            raise SharedError(failed[0])
        return [result for answer in answers for result in answer["results"]]


ALONE = Processes()


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that a launcher started, as a group; a process alone without one.

    Raises ValueError if the launcher's variables are incomplete, and LostProcess (an OSError) if another process has
    ended.
    """
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count == 1:
        yield ALONE
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE is {count} without {missing[0]}; accepted: the variables that torchrun sets")
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        with lost_process_named(dist.get_rank()):
            yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()


def _gather(answer: object) -> list[Any]:
    """The answers of all processes, by rank."""
    data = torch.tensor(list(json.dumps(answer).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = int(max(size.item() for size in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    everything = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(everything, padded)
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(everything, sizes)]
