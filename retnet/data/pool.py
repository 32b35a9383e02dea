"""Worker processes for shards: each writes whole shards and sends back only counts.

The standard library's pool waits forever for a worker that was killed, and its executor cannot be stopped during a
task. This one notices a dead worker at once, and its workers end when the parent is gone. Workers are spawned, not
forked, as the parent may have threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from retnet.data.plan import Piece, Settings
from retnet.data.readers import DataError
from retnet.data.shard_writer import Counts, write_shard
from retnet.data.tokenizer import Tokenizer
from retnet.data.tokenizer_json import saved_tokenizer

Shards = Mapping[int, list[Piece]]
Report = Callable[[int, Counts], None]


class ShardWriter(Protocol):
    """Writes one shard, with the arguments of `write_shard` but for the directory. It is pickled for the workers."""

    def __call__(
        self,
        number: int,
        pieces: Sequence[Piece],
        settings: Settings,
        tokenizer: Tokenizer,
        *,
        report: Callable[[Counts], None],
    ) -> None: ...


def into_folder(directory: Path) -> ShardWriter:
    """The writer of shards in a folder."""
    return partial(write_shard, directory=directory)


def write_here(shards: Shards, settings: Settings, tokenizer: Tokenizer, write: ShardWriter, report: Report) -> None:
    """Write shards in this process; `report` gets a shard's number and counts after every batch."""
    for number, pieces in shards.items():
        write(number, pieces, settings, tokenizer, report=partial(report, number))


def write_in_parallel(
    shards: Shards,
    settings: Settings,
    description: dict[str, Any],
    tokenizer_directory: Path,
    write: ShardWriter,
    count: int,
    report: Report,
) -> None:
    """Write shards in `count` processes, in no fixed order.

    Raises a worker's exception, and ChildProcessError for a worker that died.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Any, Any] = {}  # connection -> process
    waiting = iter(shards.items())
    try:
        for _ in range(min(count, len(shards))):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, settings, description, tokenizer_directory, write), daemon=True
            )
            process.start()
            theirs.close()
            workers[ours] = process
            ours.send(next(waiting))
        while workers:
            ready: list[Any] = list(wait(list(workers)))
            for connection in ready:
                message = _receive(connection, workers[connection])
                if isinstance(message, BaseException):
                    raise message
                if message is not None:
                    report(*message)
                    continue
                task = next(waiting, None)  # the worker is idle
                try:
                    connection.send(task)
                except BrokenPipeError as error:  # it died after its last message
                    raise _died(workers[connection]) from error
                if task is None:
                    workers.pop(connection).join()
                    connection.close()
    finally:
        for connection, process in workers.items():
            process.terminate()
            process.join()
            connection.close()


def _receive(connection: Any, process: Any) -> tuple[int, Counts] | BaseException | None:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return _died(process)


def _died(process: Any) -> ChildProcessError:
    process.join()
    return ChildProcessError(
        f"a worker process died (exit code {process.exitcode}; perhaps out of memory: fewer --workers need less); "
        "the same command resumes where it stopped"
    )


def _send(connection: Connection, number: int, counts: Counts) -> None:
    connection.send((number, counts))


def _work(
    connection: Connection,
    settings: Settings,
    description: dict[str, Any],
    tokenizer_directory: Path,
    write: ShardWriter,
) -> None:
    """Worker loop: receives tasks and sends counts. None from the worker means idle, None from the parent the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        tokenizer = saved_tokenizer(tokenizer_directory, description)
        while (task := connection.recv()) is not None:
            number, pieces = task
            try:
                write(number, pieces, settings, tokenizer, report=partial(_send, connection, number))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (DataError, OSError) as error:
                connection.send(error)
            except Exception:
                connection.send(RuntimeError(f"shard {number}: {traceback.format_exc()}"))
            else:
                connection.send(None)
