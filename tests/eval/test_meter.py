import time
from itertools import pairwise

from retnet.eval import meter
from retnet.eval.meter import BINS, StreamMeter


def test_bins_cover_every_token_after_the_first_once_and_stay_few(monkeypatch):
    monkeypatch.setattr(meter, "resident_bytes", lambda: 1)
    stream = StreamMeter()
    for _ in range(10_000):
        stream.tick()
    bins = stream.bins
    assert stream.tokens == 10_000
    assert len(bins) < BINS
    assert bins[0].first == 1
    assert all(a.first + a.count == b.first for a, b in pairwise(bins))
    assert 10_000 - (bins[-1].first + bins[-1].count) < bins[-1].count


def test_times_are_means_over_the_bin(monkeypatch):
    clock = iter(float(t) for t in range(10_000))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(meter, "resident_bytes", lambda: 1)
    stream = StreamMeter()
    for _ in range(1000):
        stream.tick()
    assert stream.seconds_to_first > 0
    total = sum(b.seconds_per_token * b.count for b in stream.bins)
    assert all(b.seconds_per_token > 0 for b in stream.bins)
    assert total < 10_000


def test_two_bins_that_merge_keep_the_memory_of_the_later_one(monkeypatch):
    readings = iter(range(10_000))
    monkeypatch.setattr(meter, "resident_bytes", lambda: next(readings))
    stream = StreamMeter()
    for _ in range(1 + BINS):
        stream.tick()
    assert [(b.first, b.count, b.memory_bytes) for b in stream.bins[:3]] == [(1, 2, 1), (3, 2, 3), (5, 2, 5)]
    assert len(stream.bins) == BINS // 2


def test_memory_of_this_process_is_plausible():
    assert 1 << 20 < meter.resident_bytes() < 1 << 40


def test_the_time_of_a_stream_ends_with_its_last_token():
    stream = StreamMeter()
    for _ in range(3):
        stream.tick()
    taken = stream.seconds
    time.sleep(0.02)
    assert stream.seconds == taken
