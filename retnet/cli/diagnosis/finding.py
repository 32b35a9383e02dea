"""One finding of `retnet doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Status = Literal["ok", "note", "slow", "problem", "not run"]
STATUSES = get_args(Status)


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it ("" if nothing).

    status: "ok"; "note", for something optional that is missing; "slow", for something that costs time; "problem",
    which makes the exit code 1; "not run", with the reason as text.
    """

    name: str
    status: Status
    text: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def of(cls, values: Any) -> Finding:
        """The inverse of `as_dict`. Raises ValueError for anything else."""
        keys = ("name", "status", "text", "advice")
        is_finding = isinstance(values, dict) and sorted(values) == sorted(keys)
        if not is_finding or not all(isinstance(values[key], str) for key in keys) or values["status"] not in STATUSES:
            raise ValueError(f"not a finding: {values!r}")
        return cls(**values)


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
