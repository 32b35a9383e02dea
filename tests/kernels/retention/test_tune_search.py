"""The search of tuning, with a timer that needs no device."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from retnet.kernels.architectures import ARCHITECTURES
from retnet.kernels.retention import tiles, tune_search
from retnet.kernels.retention.tile_shapes import Tiles
from retnet.kernels.retention.tile_space import segment_space, state_space
from retnet.kernels.retention.tune_search import STAGES, Job, Search

K, V = 256, 512
SPACE = {
    (segment, stage): list(space(ARCHITECTURES["sm_90"], R, O, segment))
    for segment in (64, 128, 256)
    for stage, space, R, O in (
        ("state", state_space, K, V),
        ("key_contraction", segment_space, K, V),
        ("value_contraction", segment_space, V, K),
    )
}
BEST = {stage: SPACE[128, stage][len(SPACE[128, stage]) // 2] for stage in STAGES}
DEFAULT = Tiles(128, **{stage: SPACE[128, stage][-1] for stage in STAGES})


def true_time(job: Job) -> float:
    """A valley around BEST: every factor of two of a number costs a fifth, and other lengths of a segment a tenth."""
    steps = sum(
        abs(math.log2(max(1, a)) - math.log2(max(1, b)))
        for a, b in zip(vars(job.tile).values(), vars(BEST[job.stage]).values(), strict=True)
    )
    return 1.2**steps * (1.0 if job.segment == 128 else 1.1)


class Timer:
    """`true_time`, times the noise of one run, in a given number of rounds; `refused` tiles do not run."""

    def __init__(self, noise=lambda job, again: 1.0, refused=lambda job: False):
        self.noise, self.refused, self.jobs = noise, refused, []

    def __call__(self, jobs, again):
        self.jobs += jobs
        return {job: math.inf if self.refused(job) else true_time(job) * self.noise(job, again) for job in jobs}


def search(timer, in_use=DEFAULT, ranked=SPACE, rounds=100, beam=tune_search.BEAM):
    left = iter([*[1.0] * rounds, *[0.0] * 1000])
    return Search(ranked, in_use, timer, lambda: next(left), beam)


def total(chosen: Tiles) -> float:
    return sum(n * true_time(Job(stage, chosen.segment, getattr(chosen, stage))) for stage, n in STAGES.items())


def exhaustive() -> float:
    return search(Timer(), beam=None).run()[1]


@pytest.mark.parametrize("order", [1, -1], ids=["a ranking", "its reverse"])
def test_a_bad_default_is_corrected_with_a_part_of_the_measurements(order):
    timer = Timer()
    chosen, ms, default = search(timer, ranked={key: tiles[::order] for key, tiles in SPACE.items()}).run()
    assert default > 1.5 * exhaustive()
    assert ms == total(chosen)
    assert ms <= 1.05 * exhaustive()
    assert len(set(timer.jobs)) < 0.7 * sum(map(len, SPACE.values()))


def test_a_default_outside_the_space_is_measured_and_corrected():
    odd = replace(DEFAULT, segment=64, state=tiles.StateTile(16, 16, 16, 1, 1))
    chosen, _, default = search(Timer(), in_use=odd).run()
    assert default == total(odd)
    assert chosen.segment == 128


def test_a_good_default_stays_where_nothing_is_clearly_faster():
    best = Tiles(128, **BEST)
    chosen, ms, default = search(Timer(), in_use=best).run()
    assert (chosen, ms) == (best, default)
    slightly_worse = dict.fromkeys([Job(stage, 128, tile) for stage, tile in BEST.items()], 1.005)
    chosen, _, _ = search(Timer(noise=lambda job, again: slightly_worse.get(job, 1.0)), in_use=best).run()
    assert chosen == best


def test_a_lucky_run_does_not_decide():
    lucky = SPACE[128, "state"][-1]

    def noise(job, again):
        return 0.01 if job.tile == lucky and not again else 1.0

    chosen, ms, _ = search(Timer(noise)).run()
    assert chosen.state != lucky
    assert ms <= 1.5 * exhaustive()


def test_noise_of_a_twentieth_costs_at_most_that_much():
    def noise(job, again):
        return 1 + (0.01 if again else 0.05) * math.sin(hash(job.tile) % 1000)

    chosen, _, _ = search(Timer(noise)).run()
    assert total(chosen) <= 1.1 * exhaustive()


def test_refused_tiles_are_never_chosen():
    chosen, _, default = search(Timer(refused=lambda job: job.tile.stages == 3)).run()
    assert all(getattr(chosen, stage).stages != 3 for stage in STAGES)
    assert math.isinf(default) == any(getattr(DEFAULT, stage).stages == 3 for stage in STAGES)


def test_a_default_that_the_device_refuses_is_replaced():
    chosen, _, default = search(Timer(refused=lambda job: job.tile == DEFAULT.state)).run()
    assert math.isinf(default)
    assert chosen.state != DEFAULT.state


@pytest.mark.parametrize("stage", [None, "value_contraction"])
def test_nothing_that_fits_is_an_error(stage):
    with pytest.raises(RuntimeError, match="no block shape fits this device"):
        search(Timer(refused=lambda job: stage in (None, job.stage))).run()


def test_a_budget_that_ends_before_anything_ran_is_an_error_of_its_own():
    with pytest.raises(RuntimeError, match=r"the time was up after 0 block shapes, .*accepted: more seconds"):
        search(lambda jobs, again: {}, rounds=0).run()


def test_without_time_for_more_the_first_round_decides():
    timer = Timer()
    chosen, ms, default = search(timer, rounds=0).run()
    assert ms <= default
    assert chosen.state in [DEFAULT.state, *SPACE[chosen.segment, "state"][: tune_search.BEAM]]
    assert len(set(timer.jobs)) <= 9 * tune_search.BEAM + 3


def test_a_round_that_was_cut_short_is_no_error():
    class Cut(Timer):
        def __call__(self, jobs, again):
            return super().__call__(jobs if again else jobs[: len(jobs) // 2 + 1], again)

    chosen, ms, _ = search(Cut(), rounds=3).run()
    assert ms == total(chosen)


def test_an_exhaustive_search_measures_every_tile_once():
    timer = Timer()
    search(timer, beam=None).run()
    measured = timer.jobs[: sum(map(len, SPACE.values()))]
    assert len(set(measured)) == len(measured) == sum(map(len, SPACE.values()))
