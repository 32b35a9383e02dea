"""`retnet doctor` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from retnet.cli.diagnosis import child, installation
from retnet.cli.diagnosis.finding import Finding
from tests.cli.command import run
from tests.paths import ROOT

# Hides packages, as an environment without them would.
HIDE = """
import importlib.machinery, sys
class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else super().find_spec(name, path, target)
sys.meta_path[:] = [Hiding if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def findings(monkeypatch) -> list[Finding]:
    """What the checks find, for a test to fill; the process of the checks does not run."""
    found: list[Finding] = []
    monkeypatch.setattr(child, "findings_of", lambda *arguments: iter(found))
    monkeypatch.setattr(installation, "installation", lambda: iter([Finding("retnet", "ok", "[bold]1.0")]))
    return found


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("slow", 0), ("not run", 0), ("problem", 1)])
def test_only_problems_change_the_exit_code(capsys, findings, status, code):
    findings.append(Finding("GPU", status, "found", "do this"))
    assert run("doctor") == code
    text = capsys.readouterr().out
    for shown in (status, "found", "-> do this", "[bold]1.0"):
        assert shown in text
    assert run("doctor", "--json") == code
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (code == 0)
    assert told["findings"][1] == {"name": "GPU", "status": status, "text": "found", "advice": "do this"}


def test_an_installation_that_no_check_foresees_is_a_problem(capsys, findings, monkeypatch):
    def broken():
        yield Finding("retnet", "ok", "1.0")
        raise RuntimeError("metadata of another world")

    monkeypatch.setattr(installation, "installation", broken)
    assert run("doctor") == 1
    assert "RuntimeError: metadata of another world" in capsys.readouterr().out


def doctor_without(tmp_path, *hidden: str, seconds: int = 100) -> dict:
    """The JSON of the command in an environment without some packages."""
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden=set(hidden)))
    words = [sys.executable, "-m", "retnet.cli", "doctor", "--json", "--seconds", str(seconds)]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["ok"] else 1)
    return {finding["name"]: finding for finding in told["findings"]}


def test_without_torch_it_says_so_and_how_to_get_it(tmp_path):
    found = doctor_without(tmp_path, "torch", "triton", "transformers")
    assert found["PyTorch"]["status"] == "problem"
    assert "No module named 'torch'" in found["PyTorch"]["text"]
    assert found["forms agree"]["text"] == "PyTorch cannot be imported"
    assert found["extra triton"]["status"] == "note"


@pytest.mark.slow
def test_without_triton_and_transformers_the_self_check_passes(tmp_path):
    found = doctor_without(tmp_path, "triton", "transformers", "accelerate", "datasets", "matplotlib", "packaging")
    assert {found[name]["status"] for name in ("PyTorch", "forms agree", "training step", "save and load")} == {"ok"}
    assert "[hf]" in found["extra hf"]["advice"]
    assert found["core packages"]["status"] == "not run"


@pytest.mark.slow
def test_the_whole_self_check_takes_less_than_its_limit(tmp_path):
    found = doctor_without(tmp_path)
    assert not [name for name, finding in found.items() if finding["status"] == "problem"]
    assert not [name for name, finding in found.items() if "no time left" in finding["text"]]
