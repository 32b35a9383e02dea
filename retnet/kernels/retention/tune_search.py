"""The search of tuning: which block shapes to measure next, and which ones win.

A pass has three stages (border states; out and dv; dq and dk), and each has a best tile for every segment length. The
model of the architecture ranks the tiles. The first round measures the best ranked ones of every stage and length, and
the tiles in use; later rounds measure the neighbours of the fastest, at the lengths that can still win. At the end the
two fastest tiles of each stage are measured again, beside the tiles in use: those stay unless others are clearly
faster. Nothing here knows a device, a compiler or a clock: `Measure` does.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from retnet.kernels.retention.tile_shapes import SegmentTile, StateTile, Tiles
from retnet.kernels.retention.tile_space import are_neighbours

Tile = StateTile | SegmentTile

STAGES = {"state": 3, "key_contraction": 1, "value_contraction": 1}  # runs of a forward and a backward pass
BEAM = 6  # tiles of each stage and length in the first round
NEIGHBOURS = 4  # in each later round
HOPEFUL = 1.15  # lengths whose time is within this factor of the fastest are searched further
MARGIN = 0.99  # of the time of the tiles in use: what is slower than this does not replace them


class Job(NamedTuple):
    """One tile to measure: its stage, and the length of a segment."""

    stage: str
    segment: int
    tile: Tile


# The milliseconds of jobs (infinite: the compiler or the device refuses it; absent: there was no time for it), measured
# with more repeats if `again`.
Measure = Callable[[Sequence[Job], bool], dict[Job, float]]


@dataclass
class Search:
    """One search: `ranked` tiles of every (segment, stage), most promising first, and the tiles `in_use`.

    seconds_left: of the budget. It is asked before every round, and `measure` may stop a round when it is used up.
    """

    ranked: dict[tuple[int, str], list[Tile]]
    in_use: Tiles
    measure: Measure
    seconds_left: Callable[[], float]
    beam: int | None = BEAM  # None: every tile
    times: dict[Job, float] = field(default_factory=dict)

    def run(self) -> tuple[Tiles, float, float]:
        """The chosen tiles, their milliseconds for a forward and a backward pass, and those of the tiles in use
        (infinite if they were refused). RuntimeError if nothing fits the device, or nothing was ready in time."""
        first = [(key, tile) for key, tiles in self.ranked.items() for tile in tiles[: self.beam]]
        self._measure([*self._in_use(), *(Job(stage, segment, tile) for (segment, stage), tile in first)])
        while self.seconds_left() > 0 and (jobs := list(self._next())):
            self._measure(jobs)
        found = self._fastest()
        if found is None:
            raise RuntimeError(self._why_nothing())
        self._confirm(found.segment)
        found = self._fastest([found.segment]) or found
        default = self._total(self.in_use)
        chosen = found if self._total(found) < MARGIN * default else self.in_use
        return chosen, self._total(chosen), default

    def _why_nothing(self) -> str:
        """The reason why no length has a tile that ran for each stage."""
        for segment in self._segments():
            times = [
                [self.times.get(Job(stage, segment, tile), 0.0) for tile in self.ranked[segment, stage]]
                for stage in STAGES
            ]
            if not any(all(map(math.isinf, of_stage)) for of_stage in times):
                break
        else:
            return "no block shape fits this device"
        return f"the time was up after {len(self.times)} block shapes, too few for every stage; accepted: more seconds"

    def _in_use(self) -> list[Job]:
        return [Job(stage, self.in_use.segment, getattr(self.in_use, stage)) for stage in STAGES]

    def _measure(self, jobs: Iterable[Job], again: bool = False) -> None:
        new = dict.fromkeys(job for job in jobs if again or job not in self.times)
        self.times |= self.measure(list(new), again) if new else {}

    def _order(self, segment: int, stage: str) -> list[Job]:
        """The tiles of a stage and length that ran, fastest first."""
        ran = [job for job, ms in self.times.items() if job[:2] == (stage, segment) and math.isfinite(ms)]
        return sorted(ran, key=self.times.__getitem__)

    def _total(self, tiles: Tiles) -> float:
        jobs = {stage: Job(stage, tiles.segment, getattr(tiles, stage)) for stage in STAGES}
        return sum(runs * self.times.get(jobs[stage], math.inf) for stage, runs in STAGES.items())

    def _by_length(self, segments: Iterable[int]) -> list[Tiles]:
        """The fastest tiles of every length at which each stage has one that ran, fastest length first."""
        found = []
        for segment in segments:
            orders = {stage: self._order(segment, stage) for stage in STAGES}
            if all(orders.values()):
                found.append(Tiles(segment, **{stage: order[0].tile for stage, order in orders.items()}))
        return sorted(found, key=self._total)

    def _fastest(self, segments: Iterable[int] | None = None) -> Tiles | None:
        found = self._by_length(self._segments() if segments is None else segments)
        return found[0] if found else None

    def _segments(self) -> list[int]:
        return list(dict.fromkeys(segment for segment, _ in self.ranked))

    def _next(self) -> Iterable[Job]:
        """Neighbours of the fastest tiles that were not measured; where nothing ran, the next of the ranking."""
        found = self._by_length(self._segments())
        hopeful = [t.segment for t in found if self._total(t) <= HOPEFUL * self._total(found[0])] or self._segments()
        for segment in hopeful:
            for stage in STAGES:
                ranked = self.ranked.get((segment, stage), [])
                order = self._order(segment, stage)
                new = [job for job in (Job(stage, segment, tile) for tile in ranked) if job not in self.times]
                if order:
                    new = [job for job in new if are_neighbours(job.tile, order[0].tile)]
                yield from new[:NEIGHBOURS]

    def _confirm(self, segment: int) -> None:
        """Measure the leaders and the tiles in use again, together: a lucky run must not decide."""
        leaders = [job for stage in STAGES for job in self._order(segment, stage)[:2]]
        in_use = [job for job in self._in_use() if math.isfinite(self.times.get(job, math.inf))]
        self._measure([*leaders, *in_use], again=True)
