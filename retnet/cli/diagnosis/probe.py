"""The process in which `retnet doctor` runs its checks: python -m retnet.cli.diagnosis.probe CHECK...

It writes one message per line on standard output: which check begins, and what it found. A check that crashes the
process is then known by its name to the parent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

from retnet.cli.diagnosis.checks import CHECKS, TORCH
from retnet.cli.diagnosis.finding import Finding, reason
from retnet.system.extras import MissingExtra

MARK = "\x1eretnet-doctor "  # begins a message: libraries print on standard output too
BEGINS, FINDS = "begins", "finds"


def run_checks(names: Iterable[str], checks: Mapping[str, Callable[[], Iterator[Finding]]] = CHECKS) -> None:
    """Run the named checks in order and write what they find."""
    torch_works = True
    for name in names:
        _write(BEGINS, name)
        if not torch_works:
            _write(FINDS, Finding(name, "not run", "PyTorch cannot be imported").as_dict())
            continue
        try:
            for finding in checks[name]():
                _write(FINDS, finding.as_dict())
        except MissingExtra as error:
            _write(FINDS, Finding(name, "not run", str(error)).as_dict())
        except Exception as error:
            torch_works = name != TORCH
            advice = "install it again: https://pytorch.org/get-started/locally" if name == TORCH else ""
            _write(FINDS, Finding(name, "problem", reason(error), advice).as_dict())


def _write(kind: str, value: object) -> None:
    print(f"{MARK}{json.dumps([kind, value])}", flush=True)


if __name__ == "__main__":
    run_checks(sys.argv[1:])
