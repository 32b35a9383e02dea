"""Threads in lockstep, which stand for processes in checks of code for several of them."""

from __future__ import annotations

import threading
from collections.abc import Callable


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
