"""`retnet serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import retnet

_URL = re.compile(r"http://127\.0\.0\.1:\d+")


@contextmanager
def serving(model: Path, *options: object) -> Iterator[str]:
    """The URL of a server of this model. At the end it is told to stop, and has to stop in good order."""
    source = str(Path(retnet.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-m", "retnet.cli", "serve", model, "--port", 0, *options]
    process = subprocess.Popen(list(map(str, words)), env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not (lines and _URL.match(lines[-1])):
            line = process.stdout.readline()
            assert line, f"the server did not start: {lines}"
            lines.append(line)
        yield lines[-1].split()[0]
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    assert status == 0
