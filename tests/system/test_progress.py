"""Progress on terminals of any width, in logs, and on quiet consoles."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from retnet.system.progress import BYTES, LINE_SECONDS, Progress, _fitting


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def console(width: int | None = None) -> Console:
    """A terminal of this width; without one, a log."""
    if width is None:
        return Console(file=io.StringIO(), width=20)
    return Console(file=io.StringIO(), width=width, height=20, force_terminal=True, color_system=None)


def test_a_log_gets_a_whole_line_now_and_then():
    clock, log = Clock(), console()
    with Progress(log, "scoring", 1000, "tokens", clock=clock) as shown:
        for _ in range(50):
            clock.now += 1
            shown.advance(10)
    lines = log.file.getvalue().splitlines()
    assert lines[0] == "scoring: 100 of 1,000 tokens, 10 tokens/s, 1 min 30 s left"
    assert len(lines) == 50 / LINE_SECONDS


def test_a_job_that_is_soon_done_leaves_no_line():
    clock, log = Clock(), console()
    with Progress(log, "scoring", 1000, "tokens", clock=clock) as shown:
        clock.now += 9
        shown.advance(1000)
    assert log.file.getvalue() == ""


def test_a_job_without_counts_or_total_says_what_is_known():
    clock, log = Clock(), console()
    with Progress(log, "looking", clock=clock) as shown:
        clock.now += 11
        shown.begin("gzip")
        clock.now += 11
        shown.begin("writing", unit=BYTES, done=2**20)
        clock.now += 11
        shown.update(2**21, notes=["2 documents"])
    assert log.file.getvalue().splitlines() == [
        "gzip", "writing: 1 MiB", "writing: 2 MiB, 93.1 KiB/s, 2 documents",
    ]  # fmt: skip


def test_nothing_is_shown_on_a_quiet_console():
    clock = Clock()
    quiet = Console(file=io.StringIO(), quiet=True, force_terminal=True)
    with Progress(quiet, "scoring", 10, "tokens", clock=clock) as shown:
        clock.now += 60
        shown.advance(3)
        shown.print("a line")
    assert quiet.file.getvalue() == ""


@pytest.mark.parametrize("width", [1, 2, 8, 20, 40, 60, 80, 200])
def test_the_bar_is_one_line_at_any_width(width):
    clock, terminal = Clock(), console(width)
    shown = Progress(terminal, "scoring", 1_000_000, "tokens", clock=clock)
    clock.now += 9
    shown.update(250_000, notes=["loss 1.234", "12 GiB"])
    terminal.print(shown._row())
    line = terminal.file.getvalue()
    assert line.count("\n") == 1
    assert len(line.rstrip()) <= width
    if width >= 40:
        assert "scoring" in line
        assert "27 s left" in line
    if width == 200:
        assert "250,000 of 1,000,000 tokens" in line
        assert "━" in line
        assert "12 GiB" in line


def test_what_matters_least_is_left_out_first():
    ranked = [(0, "what"), (2, "count"), (1, "left"), (3, "note")]
    assert _fitting(ranked, 100) == ["what", "count", "left", "note"]
    assert _fitting(ranked, 17) == ["what", "count", "left"]
    assert _fitting(ranked, 12) == ["what", "left"]
    assert _fitting(ranked, 2) == ["what"]


def test_the_terminal_is_released_after_an_interruption():
    terminal = console(80)

    def interrupted() -> None:
        with Progress(terminal, "scoring", 10, "tokens"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    written = terminal.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rfind("\x1b[?25l")  # the cursor is shown
    assert re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written).strip("\r\n ").count("\n") <= 1


def test_the_cursor_is_never_hidden_for_long():
    terminal = console(80)
    with Progress(terminal, "scoring", 10, "tokens"):
        written = terminal.file.getvalue()
        assert written.rindex("\x1b[?25h") > written.rfind("\x1b[?25l")
