"""A run that kills itself with SIGKILL: python killed_run.py step:N|save:N KEY=VALUE...

`step:N`: in the middle of step N. `save:N`: while checkpoint N is written, with half of the optimizer's file on disk.
"""

import io
import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from retnet.train.recipe import load_recipe
from retnet.train.run import train
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
    place, number = sys.argv[1].split(":")
    {"step": kill_in_step, "save": kill_in_save}[place](int(number))
    train(load_recipe(None, sys.argv[2:]), Console(quiet=True))
