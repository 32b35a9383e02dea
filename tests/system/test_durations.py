"""Times in words, and rates that do not flatter."""

import pytest

from retnet.system.durations import LEAST, WINDOW, Rate, format_seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1.0, "0 s"), (0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (75.0, "1 min 15 s"),
        (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (4000.0, "1 h 07 min"), (90_000.0, "25 h 00 min"),
    ],
)  # fmt: skip
def test_seconds_in_words(seconds, words):
    assert format_seconds(seconds) == words


def test_a_rate_is_unknown_before_any_work():
    rate = Rate(100.0, 50)
    assert rate.per_second(110.0) is None
    rate.add(110.0, 50)
    assert rate.per_second(110.0) is None
    assert rate.seconds_left(110.0, 60) is None


def test_work_that_was_done_before_does_not_count():
    rate = Rate(0.0, 900)
    rate.add(10.0, 1000)
    assert rate.per_second(10.0) == pytest.approx(10.0)
    assert rate.seconds_left(10.0, 1100) == pytest.approx(10.0)
    assert rate.seconds_left(10.0, None) is None
    assert rate.seconds_left(10.0, 990) == 0.0  # more than was expected


def test_a_rate_looks_back_for_a_while_only():
    rate = Rate(0.0)
    for second in range(1, 101):
        rate.add(second, second)
    for second in range(1, 41):
        rate.add(100 + second, 100 + 10 * second)
    assert rate.per_second(140.0) == pytest.approx(10.0)
    assert len(rate._samples) <= WINDOW + 2


def test_the_rate_of_rare_reports_stands_still_between_them_and_falls_after():
    rate = Rate(0.0)
    for report in range(1, LEAST + 2):
        rate.add(40.0 * report, 80.0 * report)
    last = 40.0 * (LEAST + 1)
    assert rate.per_second(last + 39) == pytest.approx(2.0)
    assert rate.per_second(last + 40 + 80) == pytest.approx(1.0)
