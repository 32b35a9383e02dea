"""The end of a process that others wait for, as one message instead of the collective that noticed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_GLOO = "gloo/transport"  # in the RuntimeErrors of gloo, which have no class of their own


class LostProcess(OSError):
    """Another process has ended, and so this one cannot go on."""


@contextmanager
def lost_process_named(rank: int) -> Iterator[None]:
    """A context in which the error of a collective is a LostProcess.

    rank: of this process. Errors of its own pass through.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not _is_of_a_collective(error):
            raise
        raise LostProcess(
            f"process {rank} has lost the connection to another process, which has ended: the reason is in that "
            "process's own message"
        ) from error


def _is_of_a_collective(error: BaseException | None) -> bool:
    """Whether torch.distributed raised the error, or one that caused it."""
    from torch.distributed import DistError

    while error is not None:
        if isinstance(error, DistError) or (isinstance(error, RuntimeError) and _GLOO in str(error)):
            return True
        error = error.__cause__
    return False
