"""`retnet doctor`: versions, devices, what is slow and why, and a self-check."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from retnet.cli._common import console, errors, print_json, silent
from retnet.cli._options import AsJson
from retnet.system.progress import Progress

SECONDS = 20.0
_STYLES = {"ok": "green", "note": "dim", "slow": "yellow", "problem": "bold red", "not run": "dim"}


def doctor(
    as_json: AsJson = False,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit of the self-check.")] = SECONDS,
) -> None:
    """Check this installation: versions, devices, speed, missing extras, and a self-check of the package.

    The self-check runs the three forms of retention, a training step, saving and loading, and the kernels where there
    is a GPU. It runs in a process of its own, which may crash without harm. Exits with 1 if there is a problem; what is
    slow, missing or not run is none.

    Example: retnet doctor
    """
    from retnet.cli.diagnosis.checks import CHECKS
    from retnet.cli.diagnosis.child import findings_of
    from retnet.cli.diagnosis.finding import Finding, reason
    from retnet.cli.diagnosis.installation import installation

    began = time.monotonic()
    found: list[Finding] = []
    with Progress(silent if as_json else errors, "looking at the installation") as shown:
        try:
            found += installation()
        except Exception as error:  # a part of the installation that no check foresees
            found.append(Finding("installation", "problem", reason(error)))
        found += findings_of(list(CHECKS), seconds, lambda name: shown.begin(f"checking: {name}"))
    problems = [finding for finding in found if finding.status == "problem"]
    taken = time.monotonic() - began
    if as_json:
        print_json({"ok": not problems, "seconds": taken, "findings": [finding.as_dict() for finding in found]})
    else:
        _print(found, taken)
    raise typer.Exit(1 if problems else 0)


def _print(found: list, seconds: float) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        text = Text(finding.text)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", "cyan")
        table.add_row(Text(finding.status, _STYLES[finding.status]), Text(finding.name, "bold"), text)
    console.print(table)
    counts = {status: sum(finding.status == status for finding in found) for status in _STYLES}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console.print(f"{shown}; {seconds:.1f} s", highlight=False)
