"""The model of block shapes: what it chooses fits every architecture, and it knows what was measured on an H200."""

import itertools

import pytest
import torch

from retnet.kernels.architectures import ARCHITECTURES, MEASURED
from retnet.kernels.retention import tile_model, tiles
from retnet.kernels.retention.tile_model import predict_segment, predict_state
from retnet.kernels.retention.tile_shapes import SegmentTile, StateTile
from retnet.kernels.retention.tile_space import segment_space, state_space

DTYPES = (torch.bfloat16, torch.float16)
SIZES = ((16, 16), (24, 64), (64, 64), (64, 128), (128, 64), (128, 128), (256, 256), (256, 512), (512, 512))
H200 = ARCHITECTURES[MEASURED]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_default_fits_its_architecture(name):
    hardware = ARCHITECTURES[name]
    for dtype, (K, V), states in itertools.product(DTYPES, SIZES, (1, 64, 100_000)):
        chosen = tiles.tiles_for(hardware, dtype, K, V, num_states=states, processors=hardware.processors)
        case = (dtype, K, V, chosen)
        needed = [predict_state(hardware, chosen.state, dtype, K, V, chosen.segment)]
        for tile, R, O in ((chosen.key_contraction, K, V), (chosen.value_contraction, V, K)):
            needed.append(predict_segment(hardware, tile, dtype, R, O, chosen.segment))
        if name != MEASURED:  # there the measured ones are kept, though the bound on their bytes is above the limit
            assert all(p.shared <= hardware.shared and p.resident > 0 for p in needed), case
        assert chosen.segment >= chosen.state.BT, case


def test_few_states_take_smaller_tiles_than_many():
    for hardware in ARCHITECTURES.values():
        few, many = (
            tiles.tiles_for(hardware, torch.bfloat16, 256, 512, num_states=n, processors=hardware.processors).state
            for n in (1, 100_000)
        )
        assert few.BK * few.BV <= many.BK * many.BV


def test_a_device_without_room_is_refused_by_name():
    from dataclasses import replace

    with pytest.raises(ValueError, match="no block shape fits tiny with 1024 bytes"):
        tile_model.best_segment_tile(replace(H200, name="tiny", shared=1024), torch.bfloat16, 64, 64, 128)


def test_more_shared_memory_or_registers_than_there_are_do_not_fit():
    wide = StateTile(128, 128, 256, 8, 4)
    assert predict_state(ARCHITECTURES["sm_89"], wide, torch.bfloat16, 256, 512, 128).resident == 0
    assert predict_state(H200, StateTile(32, 128, 256, 4, 2), torch.bfloat16, 256, 512, 128).resident == 0


# The tiles that were fastest in a sweep on an H200 (dev/LOG.md), and the milliseconds of one launch there.
MEASURED_TIMES = [
    (StateTile(64, 128, 256, 8, 3), 0.28),
    (SegmentTile(64, 64, 64, 64, 128, 4, 3), 0.50),
]


@pytest.mark.parametrize(("tile", "milliseconds"), MEASURED_TIMES, ids=["state", "out"])
def test_the_model_ranks_what_was_fastest_on_an_h200_high_and_knows_its_time(tile, milliseconds):
    predict = predict_state if isinstance(tile, StateTile) else predict_segment
    space = state_space if isinstance(tile, StateTile) else segment_space
    times = {t: predict(H200, t, torch.bfloat16, 256, 512, 128).milliseconds for t in space(H200, 256, 512, 128)}
    assert tile in sorted(times, key=times.__getitem__)[:6]
    assert times[tile] == pytest.approx(milliseconds, rel=0.35)
