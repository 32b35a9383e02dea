"""Progress of long jobs: a bar on a terminal, a line now and then elsewhere.

A terminal shows one line, which fits its width at any moment: what matters least is left out first. Other outputs, such
as CI logs and `| tee`, get a whole line per report, at most one every `LINE_SECONDS`. A quiet console shows nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from retnet.system.durations import Rate, format_seconds
from retnet.system.sizes import format_bytes

LINE_SECONDS = 10.0
BAR = (8, 24)  # columns, at least and at most
BYTES = "bytes"
_BAR_PLACE = " " * BAR[0]
_GAP = 2  # columns between two parts


class Progress:
    """The progress of one job after another on a console, within `with`.

    what: the job, such as "scoring". total: in `unit`s, None if it is not known. unit: "tokens", "files", ...; `BYTES`
    are shown in binary units, and "" shows neither counts nor rates. transient: whether the bar disappears at the end.
    clock: seconds; tests give their own.
    """

    def __init__(
        self,
        console: Console,
        what: str,
        total: float | None = None,
        unit: str = "",
        *,
        transient: bool = True,
        clock: Any = time.monotonic,
    ):
        self._console, self._clock, self._transient = console, clock, transient
        self._live: Live | None = None
        self._last_line = clock()
        self.begin(what, total, unit)

    def begin(self, what: str, total: float | None = None, unit: str = "", done: float = 0.0) -> None:
        """Go on to another job, of which `done` units were done before."""
        self._what, self._total, self._unit, self._done = what, total, unit, done
        self._notes: tuple[str, ...] = ()
        self._left: float | None = None
        self._began = self._clock()
        self._rate = Rate(self._began, done)
        self._print_if_due()

    def advance(self, count: float = 1) -> None:
        """Add work that was done."""
        self.update(self._done + count)

    def update(
        self,
        done: float | None = None,
        *,
        what: str | None = None,
        total: float | None = None,
        notes: Sequence[str] | None = None,
        left: float | None = None,
    ) -> None:
        """Report the work done so far, and what else is new.

        notes: shown at the end, the most important first. left: seconds, where the caller knows better than the rate.
        """
        self._what = self._what if what is None else what
        self._total = self._total if total is None else total
        self._notes = self._notes if notes is None else tuple(notes)
        self._left = self._left if left is None else left
        if done is not None:
            self._done = done
            self._rate.add(self._clock(), done)
        self._print_if_due()

    def print(self, line: str) -> None:
        """A line that stays, above the bar where there is one."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def line(self) -> str:
        """The progress as one line of text."""
        left = self._seconds_left()
        parts = [self._count(), self._speed(), "" if left is None else f"{format_seconds(left)} left", *self._notes]
        return ": ".join(filter(None, [self._what, ", ".join(filter(None, parts))]))

    def __enter__(self) -> Progress:
        if self._console.is_interactive and not self._console.quiet:
            self._live = Live(
                get_renderable=self._row, console=self._console, transient=self._transient, refresh_per_second=4
            )
            self._live.start()
            self._console.show_cursor(True)  # a process that is killed leaves the terminal as it was
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print_if_due(self) -> None:
        now = self._clock()
        if self._live is None and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self.print(self.line())

    def _row(self) -> RenderableType:
        """The bar and what fits beside it."""
        width = self._console.width - 1  # a full line would wrap on some terminals
        left, elapsed = self._seconds_left(), format_seconds(self._clock() - self._began)
        time_left = "" if left is None else f"{format_seconds(left)} left"
        # In the order of the line; those with the lowest rank stay longest.
        ranked = [(0, self._what), (4, _BAR_PLACE), (2, self._count()), (5, self._speed())]
        ranked += [(1, time_left or f"{elapsed} so far")]
        ranked += [(3 + 3 * i, note) for i, note in enumerate(self._notes)]
        parts = _fitting(ranked, width)
        room = width - sum(len(part) + _GAP for part in parts)
        bar = ProgressBar(self._total, self._done, width=min(BAR[1], BAR[0] + room), pulse=self._total is None)
        cells = [bar if part is _BAR_PLACE else Text(part, no_wrap=True, overflow="ellipsis") for part in parts]
        grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for _ in cells:
            grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(*cells)
        return grid

    def _count(self) -> str:
        if not self._unit:
            return ""
        done, total = self._done, self._total
        if self._unit == BYTES:
            return format_bytes(done, 3) + ("" if total is None else f" of {format_bytes(total, 3)}")
        return f"{done:,.0f}" + (f" {self._unit}" if total is None else f" of {total:,.0f} {self._unit}")

    def _speed(self) -> str:
        rate = self._rate.per_second(self._clock())
        if not self._unit or rate is None:
            return ""
        if self._unit == BYTES:
            return f"{format_bytes(rate, 3)}/s"
        return f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"

    def _seconds_left(self) -> float | None:
        return self._rate.seconds_left(self._clock(), self._total) if self._left is None else self._left


def _fitting(ranked: Iterable[tuple[int, str]], width: int) -> list[str]:
    """The parts that fit into `width` columns beside each other, in their order; the lowest ranks are chosen first."""
    parts = [(rank, place, part) for place, (rank, part) in enumerate(ranked) if part]
    kept, room = [], width
    for rank, place, part in sorted(parts):
        need = len(part) + (_GAP if kept else 0)
        if not rank or need <= room:
            kept.append((place, part))
            room -= need
    return [part for _, part in sorted(kept)]
