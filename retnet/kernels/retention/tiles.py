"""Block shapes of every kernel, by architecture, dtype and head size.

Sequence length is no key. The number of states that can be carried at once, over sequences and the parts of long ones,
picks one of at most five tiles of the border-state pass, so that a few sequences fill the chip too.

The tokens of a segment share one stored state: longer segments move fewer bytes of state and do more work on pairs of
tokens. The numbers of the table were measured (benchmarks/bench_retention.py, on an H200), and sm_90 takes them. Other
architectures take what a model of their registers and shared memory chooses (`tile_model.py`); for float32 small ones
that fit all of them. Every shape is correct on every device whose shared memory holds it; where nothing is known of
the device, small ones are taken.
"""

import os
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import torch

from retnet.kernels.architectures import KIB, MEASURED, Architecture, architecture
from retnet.kernels.device import multiprocessors, power_of_two
from retnet.kernels.retention.tile_model import best_segment_tile, best_state_tiles
from retnet.kernels.retention.tile_shapes import SegmentTile, SharedTile, StateTile, StepTile, Tiles
from retnet.system.files import read_json

SEGMENT_LENGTHS = (64, 128, 256)


# From large tiles (fewer bytes) to small ones (more programs): the first that fills the chip is taken.
LARGE = (
    StateTile(64, 128, 256, 8, 3),
    StateTile(32, 128, 128, 4, 4),
    StateTile(64, 64, 128, 4, 3),
    StateTile(64, 64, 64, 4, 4),
    StateTile(64, 32, 64, 4, 4),
)
LARGE_FLOAT16 = LARGE[1:]  # float32 states pass through shared memory, which the largest tile would exceed
MEDIUM = (StateTile(128, 64, 64, 4, 3), StateTile(64, 32, 64, 4, 4), StateTile(64, 32, 32, 4, 4))
SMALL = (StateTile(64, 64, 64, 4, 2), StateTile(64, 32, 64, 4, 2), StateTile(64, 32, 32, 4, 2))
FLOAT32 = (StateTile(32, 64, 64, 4, 2), StateTile(32, 32, 64, 4, 2), StateTile(32, 32, 32, 4, 2))


def state_tiles(
    hardware: Architecture | None, dtype: torch.dtype, K: int, V: int, segment: int
) -> tuple[StateTile, ...]:
    """The candidate tiles of the border-state pass, before the head size limits them."""
    if dtype == torch.float32:
        return FLOAT32
    if hardware is not None and hardware.name != MEASURED:
        return best_state_tiles(hardware, dtype, K, V, segment)
    if hardware is None:
        return SMALL
    if not _is_large(K, V):
        return MEDIUM
    return LARGE_FLOAT16 if dtype == torch.float16 else LARGE


def _is_large(K: int, V: int) -> bool:
    return K * V > 128 * 128


def cache_file() -> Path:
    """The file of measured tiles, in $RETNET_CACHE or else in the user's cache folder."""
    home = os.environ.get("RETNET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "retnet"
    return Path(home) / "tiles.json"


def device_key(device: torch.device, dtype: torch.dtype, K: int, V: int) -> str:
    return f"{torch.cuda.get_device_name(device)}, {dtype}, {K}, {V}"


readings = 0  # how often stored tiles have been forgotten: a part of what a recorded pass depends on


def forget_stored_tiles() -> None:
    """Make the next call read `cache_file` again."""
    global readings
    readings += 1
    stored_tiles.cache_clear()
    tiles_on.cache_clear()


@cache
def stored_tiles() -> dict[str, Tiles]:
    """The tiles that `tune` stored on this machine, read once per process. ValueError for a file of another form."""
    path = cache_file()
    if not path.exists():
        return {}
    try:
        return {
            key: Tiles(
                entry["segment"],
                StateTile(**entry["state"]),
                SegmentTile(**entry["key_contraction"]),
                SegmentTile(**entry["value_contraction"]),
            )
            for key, entry in read_json(path).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not what `retnet tune` writes ({error}); accepted: its file, or none") from error


def nearest_segment(chunk_size: int) -> int:
    """The supported segment length nearest to a requested chunk size; the shorter one on a tie."""
    return min(SEGMENT_LENGTHS, key=lambda length: (abs(length - chunk_size), length))


@lru_cache(maxsize=4096)
def tiles_on(
    device: torch.device, dtype: torch.dtype, K: int, V: int, num_states: int, per_token: bool, chunk_size: int | None
) -> Tiles:
    """`tiles_for` this device, or those tuned on it (for fixed decays). Cached, because every call asks."""
    tuned = None
    if device.type == "cuda" and not per_token:
        tuned = stored_tiles().get(device_key(device, dtype, K, V))
    return tiles_for(
        architecture(device),
        dtype,
        K,
        V,
        num_states=num_states,
        processors=multiprocessors(device),
        per_token=per_token,
        chunk_size=chunk_size,
        tuned=tuned,
    )


def tiles_for(
    hardware: Architecture | None,
    dtype: torch.dtype,
    K: int,
    V: int,
    *,
    num_states: int,
    processors: int,
    per_token: bool = False,
    chunk_size: int | None = None,
    tuned: Tiles | None = None,
) -> Tiles:
    """Block shapes for an architecture, a dtype, a head size, and the number of states carried at once.

    Where `hardware` is None nothing is known of the device. With `per_token` decay, pairs of tokens cost more. `tuned`
    replaces the default shapes; a given `chunk_size` replaces the length of a segment by the nearest supported one.
    """
    segment = 64 if dtype == torch.float32 or (per_token and not _is_large(K, V)) else 128
    candidates = state_tiles(hardware, dtype, K, V, segment)
    state = _state_tile(candidates, K, V, num_states, processors)
    tiles = Tiles(segment, state, *(_segment_tile(hardware, dtype, R, O, segment) for R, O in ((K, V), (V, K))))
    if V <= 64:
        tiles = replace(tiles, value_contraction=replace(tiles.value_contraction, stages=2))
    if tuned is not None:
        # The tuned tile was measured with many states; with few, a smaller one of the table may fill the chip better.
        tiles = replace(tuned, state=_state_tile((tuned.state, *candidates), K, V, num_states, processors))
    return replace(tiles, segment=nearest_segment(chunk_size)) if chunk_size else tiles


def _state_tile(candidates: tuple[StateTile, ...], K: int, V: int, num_states: int, processors: int) -> StateTile:
    tile = candidates[0]
    for tile in candidates:
        tile = StateTile(tile.BT, min(tile.BK, power_of_two(K)), min(tile.BV, power_of_two(V)), tile.warps, tile.stages)
        if num_states * -(-K // tile.BK) * -(-V // tile.BV) >= processors:
            break
    return tile


def shared_tile(hardware: Architecture | None, states: torch.dtype, K: int, V: int, segment: int) -> SharedTile | None:
    """The tile of heads that share queries and keys, for stored states of dtype `states`. None if a program cannot hold
    the rows of a segment and a state whole."""
    roomy = hardware is not None and hardware.shared >= 160 * KIB
    if max(power_of_two(K), power_of_two(V)) * states.itemsize > (256 if roomy else 128) or segment > 64:
        return None
    return SharedTile(16, 4, 8, 3 if roomy else 2)


def _segment_tile(hardware: Architecture | None, dtype: torch.dtype, R: int, O: int, segment: int) -> SegmentTile:
    if dtype == torch.float32:
        return _float32_tile(R, O)
    if hardware is not None and hardware.name != MEASURED:
        return best_segment_tile(hardware, dtype, R, O, segment)
    return _small_tile(R, O) if hardware is None else _hopper_tile(R, O)


def _float32_tile(R: int, O: int) -> SegmentTile:
    step = min(power_of_two(R), 32)
    return SegmentTile(64, 64, step, step, min(power_of_two(O), 64), 4, 2)


def _small_tile(R: int, O: int) -> SegmentTile:
    step = min(power_of_two(R), 64)
    return SegmentTile(64, 64, step, step, min(power_of_two(O), 64), 4, 2)


def _hopper_tile(R: int, O: int) -> SegmentTile:
    step = min(power_of_two(R), 64)
    return SegmentTile(64, 64, step, step, min(power_of_two(O), 128), 4, 3)


def step_tile(K: int, V: int, heads: int, state_dtype: torch.dtype, tokens: int = 1) -> StepTile:
    """The tile of a decode step over `heads` states. A slab (for several tokens, all of the [K, BV] slice) fills the
    registers of a program, and slices get narrower until enough programs run to hide the latency of memory.

    Measured on an H200. Rounding a state narrower than float32 takes registers too, so it comes in two slabs."""
    BK, narrow = power_of_two(K), state_dtype != torch.float32
    slabs = narrow and tokens == 1
    slab, least, programs = (min(BK, 128), 32, 1024) if slabs else (BK, 16, 4096)
    width = max(least, min((8192 if narrow else 16384) // slab, power_of_two(V)))
    while width > least and heads * V // width < programs:
        width //= 2
    return StepTile(width, slab, 4)
