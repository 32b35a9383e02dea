"""The files of a checkpoint that the Trainer does not write: unlogged losses, carried states, the run."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from retnet.models.states import ModelState
from retnet.system.checks import is_number, quoted
from retnet.system.files import read_json, write_json

RUN_FILE = "run.json"
_SUMS = {"loss", "router_loss", "mtp_loss", "last_logged"}


@dataclass(frozen=True)
class ProcessState:
    """The state of one process between two steps that the Trainer does not save.

    loss, router_loss, mtp_loss: the sums since step `last_logged`. lanes: the carried states, if states are carried.
    """

    loss: float
    last_logged: int
    lanes: ModelState | None = None
    router_loss: float = 0.0
    mtp_loss: float = 0.0

    def save(self, checkpoint: Path, process: int) -> None:
        sums = {name: getattr(self, name) for name in sorted(_SUMS)}
        write_json(_progress_file(checkpoint, process), sums)
        if self.lanes is not None:
            self.lanes.trim().save(_lanes_file(checkpoint, process))

    @classmethod
    def load(cls, checkpoint: Path, process: int) -> ProcessState | None:
        """The saved state of a process; None if the checkpoint is of fewer processes. ValueError if it is damaged."""
        file, lanes = _progress_file(checkpoint, process), _lanes_file(checkpoint, process)
        if not file.exists():
            return None
        sums = read_json(file)
        if not {"loss", "last_logged"} <= sums.keys() <= _SUMS or not all(
            is_number(x, -inf, inf) for x in sums.values()
        ):
            raise ValueError(f"{file} holds {quoted(sums)}; accepted: numbers for {', '.join(sorted(_SUMS))}")
        return cls(**sums, lanes=ModelState.load(lanes) if lanes.exists() else None)


def save_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Record the run that a checkpoint is of."""
    write_json(checkpoint / RUN_FILE, run)


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What `save_run` recorded. Raises ValueError if it is damaged."""
    run = read_json(checkpoint / RUN_FILE)
    kinds = {"facts": dict, "settings": dict, "seconds": int | float, "validation_due": bool}
    if wrong := [key for key, kind in kinds.items() if not isinstance(run.get(key), kind)]:
        raise ValueError(f"{checkpoint / RUN_FILE} has {quoted(run.get(wrong[0]))} for {wrong[0]}")
    return run


def _progress_file(checkpoint: Path, process: int) -> Path:
    return checkpoint / f"progress-{process}.json"


def _lanes_file(checkpoint: Path, process: int) -> Path:
    return checkpoint / f"lanes-{process}.safetensors"
