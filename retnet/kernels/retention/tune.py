"""Tuning: measures block shapes on this device and stores the best ones, by device, dtype and head size.

Every stage is timed alone on random data that fills the chip: the border-state pass, and the segment kernel in its four
roles. Shapes that the compiler or the device refuses are skipped. The result is kept in `tiles.cache_file()`, which
later calls read instead of the shipped table; deleting the file restores the table.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import TypeVar

import torch

from retnet.kernels.device import power_of_two
from retnet.kernels.retention.portable.border_states import border_states, stored_dtype
from retnet.kernels.retention.portable.segment_decay import SegmentDecay
from retnet.kernels.retention.portable.segment_kernel import read_segments
from retnet.kernels.retention.portable.segment_read import SegmentRead
from retnet.kernels.retention.tiles import (
    SEGMENT_LENGTHS,
    SegmentTile,
    StateTile,
    Tiles,
    cache_file,
    device_key,
    forget_stored_tiles,
    stored_tiles,
)
from retnet.kernels.segments import Segments
from retnet.system.extras import needs
from retnet.system.files import write_json

with needs("triton", "Tuning"):
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

Tile = TypeVar("Tile", StateTile, SegmentTile)

REPEATS = 7  # timed runs per tile

# (x, y, z, reversed, heads summed) of the segment kernel's roles.
ROLES = {
    "out": ("q", "k", "v", False, False),
    "dv": ("k", "q", "v", True, False),
    "dq": ("v", "v", "k", False, True),
    "dk": ("v", "v", "q", True, True),
}


def tune(
    K: int, V: int, dtype: torch.dtype = torch.bfloat16, *, report: Callable[[str], None] = lambda line: None
) -> Tiles:
    """Measure, store and return the best block shapes for heads of K x V on the current device.

    RuntimeError without a GPU. `report` receives one line per measured shape.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: block shapes are tuned on the device that will run them")
    best: tuple[float, Tiles] | None = None
    for segment in SEGMENT_LENGTHS:
        segments = Segments.of(8, 4096, segment, None)
        problem = _problem(segments, K, V, dtype)
        state, state_ms = _fastest(_state_tiles(K, V), partial(_border_states, problem, segments), report)
        key, key_ms = _fastest(_segment_tiles(K, V), partial(_roles, problem, segments, ("out", "dv")), report)
        value, value_ms = _fastest(_segment_tiles(V, K), partial(_roles, problem, segments, ("dq", "dk")), report)
        total = 3 * state_ms + key_ms + value_ms  # one border-state pass forward, two backward
        report(f"segment {segment}: {total:.3f} ms forward and backward")
        if best is None or total < best[0]:
            best = total, Tiles(segment, state, key, value)
    assert best is not None
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    forget_stored_tiles()  # another process may have stored some since
    table = {key: asdict(tiles) for key, tiles in stored_tiles().items()}
    table[device_key(torch.device("cuda"), dtype, K, V)] = asdict(best[1])
    write_json(path, dict(sorted(table.items())))
    forget_stored_tiles()
    return best[1]


def _state_tiles(K: int, V: int) -> Iterator[StateTile]:
    key, value = power_of_two(K), power_of_two(V)
    for BK, BV, BT in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256), (32, 64, 128)):
        if min(key, 32) <= BK <= key and min(value, 32) <= BV <= value:
            warps = 8 if BK * BV > 128 * 128 else 4
            yield from (StateTile(BT, BK, BV, warps, stages) for stages in (3, 4))


def _segment_tiles(R: int, O: int) -> Iterator[SegmentTile]:
    step, width = min(power_of_two(R), 64), power_of_two(O)
    for BM, BN, BO, warps in ((64, 64, 64, 4), (64, 64, 128, 4), (128, 64, 128, 8), (128, 64, 256, 8)):
        tile = SegmentTile(BM, BN, step, step, min(BO, width), warps, 2)
        yield from (replace(tile, stages=stages) for stages in (2, 3))
        if step < power_of_two(R) <= 256:
            yield replace(tile, BR=power_of_two(R))


def _problem(segments: Segments, K: int, V: int, dtype: torch.dtype) -> dict[str, torch.Tensor | SegmentDecay]:
    """Eight heads of 32768 tokens: more programs than any device runs at once."""
    H = 8
    q, k = (torch.randn(segments.num_tokens, H, K, device="cuda", dtype=dtype) for _ in range(2))
    v = torch.randn(segments.num_tokens, H, V, device="cuda", dtype=dtype)
    states = torch.randn(segments.num_slots, H, K, V, device="cuda").to(stored_dtype(dtype))
    decay = SegmentDecay.of(torch.linspace(-0.03, -0.001, H, device="cuda"), None, segments)
    return {"q": q, "k": k, "v": v, "states": states, "decay": decay}


def _border_states(problem: dict, segments: Segments, tile: StateTile) -> None:
    border_states(
        problem["k"],
        problem["v"],
        problem["decay"],
        segments,
        tile,
        scale=1.0,
        initial=None,
        final_dtype=torch.float32,
        reverse=False,
    )


def _roles(problem: dict, segments: Segments, roles: tuple[str, ...], tile: SegmentTile) -> None:
    for role in roles:
        x, y, z, reverse, sum_heads = ROLES[role]
        tensors = (problem[name] for name in (x, y, z, "states"))
        read_segments(SegmentRead(*tensors, problem["decay"], segments, 1.0, 1.0, reverse, sum_heads), tile)


def _fastest(tiles: Iterator[Tile], run: Callable[[Tile], None], report: Callable[[str], None]) -> tuple[Tile, float]:
    timed = []
    for tile in tiles:
        try:
            timed.append((_milliseconds(partial(run, tile)), tile))
        except (OutOfResources, CompilationError) as error:
            report(f"{tile}: refused ({error})")
            continue
        report(f"{tile}: {timed[-1][0]:.3f} ms")
    if not timed:
        raise RuntimeError("no block shape fits this device")
    milliseconds, tile = min(timed, key=lambda pair: pair[0])
    return tile, milliseconds


def _milliseconds(run: Callable[[], None]) -> float:
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)
