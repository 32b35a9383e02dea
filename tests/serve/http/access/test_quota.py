"""Quotas of callers."""

from __future__ import annotations

import pytest

from retnet.serve.http.access import quota
from retnet.serve.http.access.quota import Quotas
from retnet.serve.http.errors import ApiError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def enter(quotas: Quotas, caller: str) -> None:
    with quotas.place(caller):
        pass


def test_a_caller_beyond_its_rate_waits_and_others_do_not():
    clock = Clock()
    quotas = Quotas(30, None, clock)
    for _ in range(5):  # the burst of 10 seconds
        enter(quotas, "alice")
    with pytest.raises(ApiError, match="more than 30 requests per minute") as caught:
        enter(quotas, "alice")
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "2"})
    enter(quotas, "bob")
    clock.now += 2
    enter(quotas, "alice")
    with pytest.raises(ApiError):
        enter(quotas, "alice")
    clock.now += 1000  # no more than a burst is saved up
    for _ in range(5):
        enter(quotas, "alice")
    with pytest.raises(ApiError):
        enter(quotas, "alice")


def test_a_rate_below_one_per_burst_still_lets_one_pass():
    clock = Clock()
    quotas = Quotas(1, None, clock)
    enter(quotas, "alice")
    with pytest.raises(ApiError) as caught:
        enter(quotas, "alice")
    assert caught.value.headers == {"Retry-After": "60"}


def test_requests_at_a_time_are_counted_until_they_end_also_by_an_error():
    quotas = Quotas(None, 2)
    with quotas.place("alice"), quotas.place("alice"):
        with pytest.raises(ApiError, match="2 requests of this caller run"):
            enter(quotas, "alice")
        enter(quotas, "bob")
    with pytest.raises(RuntimeError), quotas.place("alice"):
        raise RuntimeError
    with quotas.place("alice"), quotas.place("alice"):
        pass


def test_callers_that_went_away_are_forgotten_first_and_running_ones_never(monkeypatch):
    monkeypatch.setattr(quota, "MOST_CALLERS", 3)
    quotas = Quotas(None, 1)
    with quotas.place("runs"):
        for i in range(10):
            enter(quotas, f"caller {i}")
        assert len(quotas._callers) == 3
        with pytest.raises(ApiError):
            enter(quotas, "runs")


def test_without_limits_nothing_is_remembered():
    quotas = Quotas(None, None)
    enter(quotas, "alice")
    assert not quotas._callers
