"""`distil.json`: what a distillation was asked for and what its finished stages gave, from which a call resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retnet.system.checks import quoted
from retnet.system.files import read_json, write_json

RECORD_FILE = "distil.json"


class Record:
    """The record of an output directory. asked: facts that a call which resumes must share, as plain JSON values."""

    def __init__(self, output: Path, asked: Mapping[str, Any]):
        self._file = output / RECORD_FILE
        self._data: dict[str, Any] = {"asked": dict(asked), "done": {}}

    @classmethod
    def resumed(cls, output: Path, asked: Mapping[str, Any]) -> Record:
        """The record of an earlier call. Raises ValueError if it asked for something else, or is damaged."""
        record = cls(output, asked)
        saved = read_json(record._file)
        before, done = saved.get("asked"), saved.get("done")
        if not isinstance(before, dict) or not isinstance(done, dict):
            raise ValueError(f"{record._file} is not the record of a distillation: it holds {quoted(saved)}")
        for key, value in asked.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{output} was made with another {key}; accepted: the same as before, or another directory"
                )
        record._data["done"] = done
        return record

    def has(self, stage: str) -> bool:
        """Whether the stage is finished."""
        return stage in self._data["done"]

    def __getitem__(self, stage: str) -> Any:
        return self._data["done"][stage]

    def finish(self, stage: str, result: Any) -> None:
        """Write what a stage gave, as plain JSON values."""
        self._data["done"][stage] = result
        write_json(self._file, self._data)

    def begin(self) -> None:
        """Write the record of a distillation that has finished no stage."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, self._data)
