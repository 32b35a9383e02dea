"""Compilers of tuning: processes that compile kernels into Triton's cache before the device runs them.

Compiling takes one to several seconds per kernel, a measurement milliseconds. So as many processes compile as there are
processors, and the process that tunes only loads the results. A compiler has no GPU: it compiles for the target that it
is given, from tensors without memory (`python -m retnet.kernels.retention.tune_compile`).
"""

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any

from retnet.kernels.retention.tune_search import Job
from retnet.system.machine import core_quota, usable_cores
from retnet.system.memory import available_bytes

MOST = 32  # processes
BYTES = 1 << 30  # of memory that each may need


class Compilers:
    """A pool of compiling processes for heads of K x V in `dtype` (its name), and a target of Triton."""

    def __init__(self, K: int, V: int, dtype: str, target: Sequence[Any], processes: int | None = None) -> None:
        self._command = [sys.executable, "-m", __name__, json.dumps([K, V, dtype, *target])]
        self._pool = ThreadPoolExecutor(processes or _processes())
        self._own = threading.local()
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def compiled(self, jobs: Sequence[Job], seconds_left: Callable[[], float]) -> Iterator[tuple[Job, str | None]]:
        """Jobs in the order in which they are ready, with None or why they were refused, until the time is up."""
        waiting: dict[Future, Job] = {self._pool.submit(self._compile, job): job for job in jobs}
        while waiting:
            done, _ = wait(waiting, timeout=max(0.0, seconds_left()), return_when=FIRST_COMPLETED)
            if not done:
                break
            for future in done:
                yield waiting.pop(future), future.result()
        for future in waiting:
            future.cancel()

    def _compile(self, job: Job) -> str | None:
        """Have this thread's process compile a job. A process that cannot even start leaves it to the caller."""
        process = getattr(self._own, "process", None)
        starts = process is None
        if process is None:
            pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
            )
            self._own.process = process
            self._processes.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([job.stage, job.segment, asdict(job.tile)]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):
            answer = ""
        if answer:
            return json.loads(answer)
        self._own.process = None
        return None if starts else "the compiler crashed"


def _processes() -> int:
    memory, quota = available_bytes(), core_quota()
    cores = usable_cores() if quota is None else min(usable_cores(), math.ceil(quota))
    return max(1, min(MOST, cores, MOST if memory is None else memory // BYTES))


def serve(words: list[str]) -> None:
    """Compile the jobs of standard input, one JSON line each, and answer with null or the reason of a refusal."""
    from retnet.kernels.absent_gpu import compiling
    from retnet.kernels.retention.tile_shapes import SegmentTile, StateTile
    from retnet.kernels.retention.tune_stages import Stages

    K, V, dtype, backend, name, lanes = json.loads(words[0])
    stages = Stages(K, V, dtype, "meta")
    with compiling(backend, name, lanes):
        for line in sys.stdin:
            stage, segment, numbers = json.loads(line)
            try:
                stages.run(Job(stage, segment, (StateTile if stage == "state" else SegmentTile)(**numbers)))
                refused = None
            except Exception as error:  # whatever the compiler says of a tile, the next one may work
                reasons = str(error).split("\n")  # a compiler's error starts with the source
                reason = next((line for line in reversed(reasons) if line.strip()), "")
                refused = f"{type(error).__name__}: {reason}"[:300]
            print(json.dumps(refused), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
