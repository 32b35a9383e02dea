"""Runs checks in a process of their own: one that crashes, hangs or prints nonsense costs its own check alone."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from retnet.cli.diagnosis.checks import TORCH
from retnet.cli.diagnosis.finding import Finding
from retnet.cli.diagnosis.probe import BEGINS, FINDS, MARK

PROBE = (sys.executable, "-X", "faulthandler", "-m", "retnet.cli.diagnosis.probe")
LAST_LINES = 3  # of standard error, shown for a process that died
MOST_WORDS = 20_000  # bytes


def findings_of(
    checks: Sequence[str],
    seconds: float,
    on_begin: Callable[[str], None] = lambda name: None,
    probe: Sequence[str] = PROBE,
) -> Iterator[Finding]:
    """What the named checks find, within a time limit.

    A check that ends the process is a problem, and the next ones run in a new one. Checks that the time does not
    suffice for are "not run". on_begin: gets the name of each check. probe: the command, which gets names as arguments.
    """
    end = time.monotonic() + seconds
    left = list(checks)
    while left:
        process = _Process([*probe, *left])
        try:
            running: str | None = None
            for message in process.messages(end):
                kind, value = message
                if kind == BEGINS:
                    running = str(value)
                    if running in left:
                        del left[: left.index(running) + 1]
                    on_begin(running)
                elif kind == FINDS:
                    yield Finding.of(value)
            died, last_words = process.ended(), process.last_words()
        finally:
            process.close()
        if died is None:  # the time is over
            if running is not None:
                yield Finding(running, "not run", f"not done within the {seconds:g} s of all checks", _MORE_TIME)
            for name in left:
                yield Finding(name, "not run", f"no time left of {seconds:g} s", _MORE_TIME)
            return
        if died == 0 and not left:
            return
        culprit = running if running is not None else left.pop(0)
        yield Finding(culprit, "problem", f"the check ended its process: {_name(died)}{last_words}")
        if culprit == TORCH:
            for name in left:
                yield Finding(name, "not run", "PyTorch cannot be imported")
            return


_MORE_TIME = "retnet doctor --seconds 60"


class _Process:
    """A process, the messages it writes, and its standard error in a file."""

    def __init__(self, command: Sequence[str]):
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def messages(self, end: float) -> Iterator[tuple[str, object]]:
        """Messages up to the end of the output, or of the time."""
        while (left := end - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                return
            if line is None:
                self._process.wait()
                return
            text = line.decode(errors="replace")
            if MARK in text:
                kind, value = json.loads(text.partition(MARK)[2])
                yield kind, value

    def ended(self) -> int | None:
        """The exit code; None if the process runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """The last lines on standard error."""
        self._errors.seek(0)
        text = self._errors.read()[-MOST_WORDS:].decode(errors="replace")
        text = text.partition("Fatal Python error")[0] or text  # its traceback is long, and the signal is known
        lines = [line for line in text.splitlines() if line.strip()]
        return f" ({' | '.join(lines[-LAST_LINES:])})" if lines else ""

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=1)
        self._errors.close()


def _name(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
