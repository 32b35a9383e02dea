"""A run that kills itself with SIGKILL: python killed_run.py PLACE:N[:PROCESS] KEY=VALUE...

`step:N`: in the middle of step N. `save:N`: while checkpoint N is written, with half of the optimizer's file on disk.
`write:N`: in the background, with half of a shard on disk. `commit:N`: in the background, once all processes have
written. PROCESS: the one that kills itself; all of them without it.
"""

import io
import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from retnet.train import staged_trainer, throughput
from retnet.train.recipe import load_recipe
from retnet.train.run import train
from retnet.train.shard_storage import ShardWriter
from retnet.train.trainer import PackedTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(number: int) -> None:
    original = PackedTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step + 1 == number:
            die()
        return loss

    PackedTrainer.training_step = training_step


def kill_in_write(number: int) -> None:
    original = ShardWriter._write_file

    def write_file(self, file, *args):
        results = original(self, file, *args)
        if self.folder.name == f"checkpoint-{number}":
            path = self.folder / file
            os.truncate(path, path.stat().st_size // 2)
            die()
        return results

    ShardWriter._write_file = write_file


def kill_in_commit(number: int) -> None:
    original = staged_trainer.commit

    def commit(folder, *args):
        if folder.name == f"checkpoint-{number}":
            die()
        return original(folder, *args)

    staged_trainer.commit = commit


def kill_in_save(number: int) -> None:
    original = torch.save

    def save(value, file, *args, **kwargs):
        path = Path(file)
        if path.name == "optimizer.pt" and path.parent.name == f"checkpoint-{number}":
            buffer = io.BytesIO()
            original(value, buffer, *args, **kwargs)
            data = buffer.getvalue()
            with path.open("wb") as half:
                half.write(data[: len(data) // 2])
            die()
        original(value, file, *args, **kwargs)

    torch.save = save


if __name__ == "__main__":
    torch.set_num_threads(1)
    throughput._PRODUCT_SECONDS = 0.0  # of the measurement of this device
    place, number, *process = sys.argv[1].split(":")
    places = {"step": kill_in_step, "save": kill_in_save, "write": kill_in_write, "commit": kill_in_commit}
    if not process or process == [os.environ.get("RANK", "0")]:
        places[place](int(number))
    train(load_recipe(None, sys.argv[2:]), Console(quiet=True))
