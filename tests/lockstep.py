"""Checks of code for several processes: threads in lockstep that stand for them, and torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from tests.paths import ROOT


class Lockstep:
    """What the threads hand each other."""

    def __init__(self, size: int):
        self.size = size
        self.barrier, self.given = threading.Barrier(size, timeout=60), [None] * size

    def all(self, rank: int, x: object) -> list:
        """x of all threads."""
        self.given[rank] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


def in_lockstep(size: int, work: Callable[[int, Lockstep], None]) -> None:
    """Run work(rank, lockstep) in as many threads; raises the first error.

    An AssertionError must come after all exchanges of a check: otherwise the other threads would wait.
    """
    lockstep, errors = Lockstep(size), []

    def run(rank: int) -> None:
        try:
            work(rank, lockstep)
        except Exception as error:
            errors.append(error)
            if not isinstance(error, AssertionError):  # at a different exchange than the others
                lockstep.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (broken or errors)[0]


def on_processes(processes: int, script: str, *words: object) -> str:
    """The last line that a script prints under torchrun with gloo."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    places = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    done = subprocess.run([*launch, script, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
