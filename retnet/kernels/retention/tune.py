"""Tuning: measures block shapes on this device and stores the best ones, by device, dtype and head size.

Every stage is timed alone on random data that fills the device (`tune_stages.py`). The model of the architecture says
what to measure first (`tune_search.py`), and as many processes compile as there are processors (`tune_compile.py`), so
that a search from a cold cache takes less than a minute. The result is kept in `tiles.cache_file()`, which later calls
read instead of the defaults; deleting the file restores them.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from retnet.kernels.architectures import architecture
from retnet.kernels.retention.tile_model import predict_segment, predict_state
from retnet.kernels.retention.tile_shapes import StateTile, Tiles
from retnet.kernels.retention.tile_space import segment_space, state_space
from retnet.kernels.retention.tiles import (
    SEGMENT_LENGTHS,
    cache_file,
    device_key,
    forget_stored_tiles,
    stored_tiles,
    tiles_on,
)
from retnet.kernels.retention.tune_compile import Compilers
from retnet.kernels.retention.tune_search import Job, Search, Tile
from retnet.kernels.retention.tune_stages import Stages
from retnet.system.extras import needs
from retnet.system.files import write_json

with needs("triton", "Tuning"):
    from triton.compiler.errors import CompilationError
    from triton.runtime.driver import driver
    from triton.runtime.errors import OutOfResources

SECONDS = 50.0  # of a search
RESERVE = 4.0  # seconds of them for the last measurements
REPEATS, REPEATS_AGAIN = 5, 25  # timed runs per tile
MANY = 1 << 20  # states at once: the tiles in use are those of calls that fill the device


@dataclass(frozen=True)
class Tuned:
    """What a search found: the tiles, their milliseconds for one forward and backward pass of 8 x 4096 tokens and 8
    heads, those of the tiles in use before (infinite if the device refuses them), and what it took."""

    tiles: Tiles
    milliseconds: float
    before: Tiles
    before_milliseconds: float
    measured: int
    seconds: float


def tune(
    K: int,
    V: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seconds: float | None = SECONDS,
    report: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Measure, store and return the best block shapes for heads of K x V on the current device.

    seconds: the time of the search; None measures every tile. `report` receives one line per measured tile.
    RuntimeError without a GPU, and if no tile fits it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: block shapes are tuned on the device that will run them")
    start, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    before = tiles_on(device, dtype, K, V, MANY, False, None)

    def seconds_left() -> float:
        return math.inf if seconds is None else seconds - RESERVE - (time.monotonic() - start)

    target = driver.active.get_current_target()
    name = str(dtype).removeprefix("torch.")
    with Compilers(K, V, name, (target.backend, target.arch, target.warp_size)) as compilers:
        timer = Timer(Stages(K, V, name, "cuda"), compilers, seconds_left, report)
        search = Search(ranked(device, dtype, K, V), before, timer, seconds_left)
        if seconds is None:
            search.beam = None
        chosen, milliseconds, before_milliseconds = search.run()
    store(device_key(device, dtype, K, V), chosen)
    took = time.monotonic() - start
    return Tuned(chosen, milliseconds, before, before_milliseconds, len(search.times), took)


def ranked(device: torch.device, dtype: torch.dtype, K: int, V: int) -> dict[tuple[int, str], list[Tile]]:
    """The tiles of every (segment, stage) that can be measured, the fastest by the model first."""
    hardware = architecture(device)
    assert hardware is not None
    result: dict[tuple[int, str], list[Tile]] = {}
    for segment in SEGMENT_LENGTHS:
        times: dict[Tile, float] = {
            tile: predict_state(hardware, tile, dtype, K, V, segment).milliseconds
            for tile in state_space(hardware, K, V, segment)
        }
        result[segment, "state"] = sorted(times, key=times.__getitem__)
        for stage, R, O in (("key_contraction", K, V), ("value_contraction", V, K)):
            times = {
                tile: predict_segment(hardware, tile, dtype, R, O, segment).milliseconds
                for tile in segment_space(hardware, R, O, segment)
            }
            result[segment, stage] = sorted(times, key=times.__getitem__)
    return result


def store(key: str, tiles: Tiles) -> None:
    """Add an entry to the file of measured tiles, and make the next call read it."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    forget_stored_tiles()  # another process may have stored some since
    table = {name: asdict(kept) for name, kept in stored_tiles().items()} | {key: asdict(tiles)}
    write_json(path, dict(sorted(table.items())))
    forget_stored_tiles()


@dataclass
class Timer:
    """`tune_search.Measure` on the current device: compiles in the pool, and times each tile as soon as it is ready."""

    stages: Stages
    compilers: Compilers
    seconds_left: Callable[[], float]
    report: Callable[[str], None]

    def __call__(self, jobs: Sequence[Job], again: bool) -> dict[Job, float]:
        if again:
            rounds = [{job: self._milliseconds(job, REPEATS_AGAIN) for job in jobs} for _ in range(3)]
            return {job: min(times[job] for times in rounds) for job in jobs}
        times = {}
        for job, refused in self.compilers.compiled(jobs, self.seconds_left):
            try:
                times[job] = math.inf if refused else self._milliseconds(job, REPEATS)
            except (OutOfResources, CompilationError) as error:
                times[job], refused = math.inf, str(error)
            outcome = f"refused ({refused})" if refused else f"{times[job]:.3f} ms"
            kind = "" if isinstance(job.tile, StateTile) else f"{job.stage} "
            self.report(f"{kind}{job.tile}, segments of {job.segment}: {outcome}")
        return times

    def _milliseconds(self, job: Job, repeats: int) -> float:
        """The median over runs that were queued while the device was busy: the host's time is not measured."""
        run = partial(self.stages.run, job)
        run()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda._sleep(2_000_000 * min(repeats, 8))
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)
