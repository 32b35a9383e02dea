"""The times at which a report is written, and the report that a crash leaves."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from retnet.train.report import callback
from retnet.train.report.callback import MOST_OF_TIME, WRITE_SECONDS, Report, Subject
from retnet.train.stopping import RunClock, Terminated

SUBJECT = Subject("Training of a model", 1000, {}, {})


class Time:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Time:
    clock = Time()
    monkeypatch.setattr(callback, "time", clock)
    return clock


def state(step: int, *log: dict) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=10, log_history=list(log))


def report_in(folder, warnings: list[str] | None = None) -> Report:
    return Report(folder / "report.html", SUBJECT, RunClock(None), (warnings if warnings is not None else []).append)


def shown(report: Report) -> str:
    """The status and the steps that the file shows."""
    text = report.path.read_text()
    status = text.partition('<span class="status ')[2].partition('"')[0]
    return f"{status}, {text.partition('<b>')[2].partition('</b>')[0]}"


def test_a_report_is_renewed_now_and_then_and_at_the_end(tmp_path, clock):
    report = report_in(tmp_path)
    report.on_train_begin(None, state(0), None)
    assert shown(report) == "running, 0 of 10"
    clock.now += WRITE_SECONDS - 1
    report.on_log(None, state(3), None)
    assert shown(report) == "running, 0 of 10"
    clock.now += 1
    report.on_log(None, state(4), None)
    assert shown(report) == "running, 4 of 10"
    report.on_log(None, state(10), None)
    report.finish([("a", "b")])
    assert shown(report) == "finished, 10 of 10"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_report_that_takes_long_is_written_less_often(tmp_path, clock, monkeypatch):
    def slow(page, now=None) -> bytes:
        clock.now += 2.0
        return b""

    monkeypatch.setattr(callback, "render", slow)
    report = report_in(tmp_path)
    report.on_train_begin(None, state(0), None)
    assert report._next == pytest.approx(2.0 + 2.0 / MOST_OF_TIME)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Terminated(4, "how to resume"), "terminated at step 4; how to resume"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("a <b> loss"), "ValueError: a &lt;b&gt; loss"),
    ],
)
def test_a_run_that_ends_early_says_why(tmp_path, clock, error, said):
    report = report_in(tmp_path)
    report.on_train_begin(None, state(4), None)
    report.stop(error)
    assert shown(report) == "stopped, 4 of 10"
    assert f"</span> {said}</p>" in report.path.read_text()


def test_a_run_that_ends_before_its_first_step_leaves_no_report(tmp_path, clock):
    report = report_in(tmp_path)
    report.stop(ValueError("nothing"))
    assert os.listdir(tmp_path) == []


def test_a_crash_while_writing_leaves_the_report_before(tmp_path, clock, monkeypatch):
    report = report_in(tmp_path)
    report.on_train_begin(None, state(0), None)

    def dies(page, now=None) -> bytes:
        raise MemoryError

    monkeypatch.setattr(callback, "render", dies)
    with pytest.raises(MemoryError):
        report.finish([])
    assert shown(report) == "running, 0 of 10"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_disk_that_refuses_the_report_is_said_once_and_ends_no_run(tmp_path, clock):
    warnings: list[str] = []
    report = report_in(tmp_path / "gone", warnings)
    report.on_train_begin(None, state(0), None)
    report.finish([])
    (warning,) = warnings
    assert "the report is not written" in warning
    assert "gone" in warning
