"""A check that crashes, hangs or prints nonsense costs its own check alone."""

from __future__ import annotations

import sys
import time

import pytest

from retnet.cli.diagnosis.child import findings_of
from retnet.cli.diagnosis.finding import Finding
from retnet.cli.diagnosis.probe import BEGINS, FINDS, MARK

# A probe whose checks are named after what they do.
PROBE = f"""
import json, os, signal, sys, time
def write(*message): print({MARK!r} + json.dumps(message), flush=True)
for name in sys.argv[1:]:
    write({BEGINS!r}, name)
    if name == "segfault":
        print("a last word", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "PyTorch": os.kill(os.getpid(), signal.SIGILL)
    if name == "exits": os._exit(7)
    if name == "leaves": sys.exit(0)
    if name == "hangs": time.sleep(60)
    if name == "noise": print("text of a library", flush=True)
    write({FINDS!r}, dict(name=name, status="ok", text="fine", advice=""))
"""


def found(*checks: str, seconds: float = 60.0) -> list[Finding]:
    return list(findings_of(checks, seconds, probe=(sys.executable, "-S", "-c", PROBE)))


def test_checks_run_in_order_beside_the_noise_of_libraries():
    begun: list[str] = []
    command = (sys.executable, "-S", "-c", PROBE)
    findings = list(findings_of(["a", "noise", "b"], 60, begun.append, command))
    assert begun == [finding.name for finding in findings] == ["a", "noise", "b"]
    assert {finding.status for finding in findings} == {"ok"}


@pytest.mark.parametrize(
    ("check", "said"),
    [("segfault", "signal SIGSEGV (a last word)"), ("exits", "exit code 7"), ("leaves", "exit code 0")],
)
def test_a_check_that_ends_the_process_is_named_and_the_others_run(check, said):
    before, culprit, after = found("a", check, "b")
    assert (before.status, culprit.status, after.status) == ("ok", "problem", "ok")
    assert culprit.name == check
    assert said in culprit.text


def test_the_last_check_may_end_the_process_too():
    assert [finding.status for finding in found("a", "exits")] == ["ok", "problem"]


def test_a_process_that_never_begins_a_check_is_a_problem_of_each():
    command = (sys.executable, "-S", "-c", "raise SystemExit('no module named retnet')")
    findings = list(findings_of(["a", "b"], 60, probe=command))
    assert [finding.name for finding in findings] == ["a", "b"]
    assert all(f.status == "problem" and "no module named retnet" in f.text for f in findings)


def test_time_that_is_over_is_said_for_every_check_that_is_left():
    began = time.monotonic()
    findings = found("hangs", "a", "b", seconds=0.6)
    assert time.monotonic() - began < 10
    assert [finding.status for finding in findings] == ["not run"] * 3
    assert "not done within the 0.6 s" in findings[0].text
    assert findings[1].text == "no time left of 0.6 s"


def test_a_torch_that_crashes_is_tried_once():
    crashed, after = found("PyTorch", "a")
    assert (crashed.status, after.status) == ("problem", "not run")
    assert "SIGILL" in crashed.text
