"""Tuning around its search: the ranking, the file, and the budget."""

import math

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.architectures import ARCHITECTURES
from retnet.kernels.retention import tiles, tune
from retnet.kernels.retention.tile_shapes import StateTile
from retnet.kernels.retention.tune_search import STAGES, Job


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RETNET_CACHE", str(tmp_path))
    tiles.forget_stored_tiles()
    yield
    tiles.forget_stored_tiles()


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(tune, "architecture", lambda device: ARCHITECTURES["sm_90"])


def test_every_stage_and_length_is_ranked_and_what_does_not_fit_comes_last(h200):
    ranked = tune.ranked(torch.device("cuda"), torch.bfloat16, 256, 512)
    assert set(ranked) == {(segment, stage) for segment in tiles.SEGMENT_LENGTHS for stage in STAGES}
    for (segment, stage), order in ranked.items():
        assert len(set(order)) == len(order) > 5
        if stage == "state":
            times = [
                tune.predict_state(ARCHITECTURES["sm_90"], t, torch.bfloat16, 256, 512, segment).milliseconds
                for t in order
            ]
            assert times == sorted(times)
            assert math.isfinite(times[0])


def test_entries_of_other_devices_stay_in_the_file():
    kept = tiles.tiles_for(ARCHITECTURES["sm_90"], torch.bfloat16, 64, 64, num_states=1000, processors=132)
    tune.store("one gpu", kept)
    tune.store("another", kept)
    assert tiles.stored_tiles() == {"one gpu": kept, "another": kept}


def test_a_refused_tile_is_reported_and_not_timed(monkeypatch):
    jobs = [Job("state", 64, StateTile(32, 32, 32, 4, stages)) for stages in (2, 3)]

    class Pool:
        def compiled(self, jobs, seconds_left):
            yield jobs[0], None
            yield jobs[1], "too much shared memory"

    lines = []
    timer = tune.Timer(None, Pool(), lambda: 1.0, lines.append)
    monkeypatch.setattr(tune.Timer, "_milliseconds", lambda self, job, repeats: 0.25)
    assert timer(jobs, again=False) == {jobs[0]: 0.25, jobs[1]: math.inf}
    assert lines[0].endswith("segments of 64: 0.250 ms")
    assert lines[1].endswith("refused (too much shared memory)")


def test_again_takes_the_best_of_three_rounds(monkeypatch):
    jobs = [Job("state", 64, StateTile(32, 32, 32, 4, stages)) for stages in (2, 3)]
    times = iter([3.0, 5.0, 2.0, 6.0, 4.0, 4.0])
    monkeypatch.setattr(tune.Timer, "_milliseconds", lambda self, job, repeats: next(times))
    assert tune.Timer(None, None, None, None)(jobs, again=True) == {jobs[0]: 2.0, jobs[1]: 4.0}
