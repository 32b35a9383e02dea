"""Runs of several processes, one after another: torchrun ... context_runs.py FILE.

FILE holds a JSON list of runs: {"words": the arguments of `retnet train`, "reordered": whether rows are cut as for
load-balanced causal attention, as a test must notice}. Runs with FSDP come last: it stays set in the environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from retnet.train.recipe import load_recipe
from retnet.train.row_shards import RowShards
from retnet.train.run import train
from tests.train.reordered import head_to_tail_batch

CUT = RowShards.cut


def cut_reordered(self: RowShards, batch: dict[str, Any]) -> dict[str, Any]:
    return CUT(self, head_to_tail_batch(batch, self.size))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        RowShards.cut = cut_reordered if run["reordered"] else CUT
        train(load_recipe(None, run["words"]), Console(quiet=True))
        AcceleratorState._reset_state()
    torch.distributed.destroy_process_group()
