"""Checks that fail in the probe, and what it says of them."""

from __future__ import annotations

import json

import pytest

from retnet.cli.diagnosis.checks import CHECKS, TORCH
from retnet.cli.diagnosis.finding import Finding
from retnet.cli.diagnosis.probe import MARK, run_checks
from retnet.system.extras import MissingExtra


def found(capsys: pytest.CaptureFixture[str], checks: dict) -> list[Finding]:
    run_checks(list(checks), checks)
    messages = [json.loads(line.removeprefix(MARK)) for line in capsys.readouterr().out.strip("\n").split("\n")]
    return [Finding.of(value) for kind, value in messages if kind == "finds"]


def raises(error: Exception):
    def check():
        raise error
        yield

    return check


def fine():
    yield Finding("fine", "ok", "as it should be")


def test_an_error_is_a_problem_of_its_check_alone(capsys):
    failed, after = found(capsys, {"a": raises(RuntimeError("no\n  kernel image")), "fine": fine})
    assert failed == Finding("a", "problem", "RuntimeError: no kernel image")
    assert after.status == "ok"


def test_a_missing_extra_is_no_problem_and_names_its_installation(capsys):
    error = MissingExtra("it needs x, which is not installed; accepted: pip install 'retnet[x]'", name="x")
    (finding,) = found(capsys, {"a": raises(error)})
    assert finding == Finding("a", "not run", str(error))


def test_without_torch_the_other_checks_say_so(capsys):
    findings = found(capsys, {TORCH: raises(ImportError("libtorch_cpu.so: cannot open")), "fine": fine})
    assert [(f.name, f.status) for f in findings] == [(TORCH, "problem"), ("fine", "not run")]
    assert "pytorch.org" in findings[0].advice
    assert findings[1].text == "PyTorch cannot be imported"


def test_torch_is_looked_at_first():
    assert next(iter(CHECKS)) == TORCH
