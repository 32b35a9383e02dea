"""Drivers of data parts, run for real: the Slurm script with a stand-in for sbatch, the Ray script on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retnet.data.build import build_shards
from retnet.data.plan import Settings
from tests.paths import ROOT

FOLDER = ROOT / "recipes" / "data"
SIZE = 0.01  # MiB
# Runs the tasks of an array, the last first; the first time, the task of part 2 is lost before it has written anything.
SBATCH = """#!/usr/bin/env bash
set -euo pipefail
for word in "$@"; do
  case $word in
    --array=1-*) last=${word#--array=1-} ;;
    --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${word#*=} ;;
    --dependency=*) echo "$word" >> "$FAKE/dependencies" ;;
    --wrap) wrapped=${*: -1} ;;
  esac
done
echo "$*" >> "$FAKE/calls"
if [ -n "${wrapped:-}" ]; then bash -c "$wrapped" >&2; echo 43; exit; fi
while [[ $1 == --* ]]; do shift; done
for ((task = last; task > 0; task--)); do
  [ "$task" = 2 ] && [ ! -e "$FAKE/lost" ] && touch "$FAKE/lost" && again=2 && continue
  SLURM_ARRAY_TASK_ID=$task bash "$@" >&2
done
[ -z "${again:-}" ] || SLURM_ARRAY_TASK_ID=$again bash "$@" >&2
echo "42;cluster"
"""


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "my texts").mkdir()
    for number in range(3):
        text = "".join(f"text {number} {line}\n" for line in range(700))
        (tmp_path / f"my texts/{number}.txt").write_text("\n--\n".join([text] * 3))
    return tmp_path / "my texts"


@pytest.fixture
def expected(source, tmp_path) -> dict[str, bytes]:
    build_shards(
        [str(source)], tmp_path / "expected", settings=Settings(separator="\n--\n"), shard_size=int(SIZE * 2**20)
    )
    found = contents(tmp_path / "expected")
    assert "00004.tokens" in found
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def options(*words: str) -> list[str]:
    return [*words, "--separator", r"\n--\n", "--shard-size", str(SIZE)]


@pytest.mark.slow
def test_the_slurm_script_writes_the_bytes_of_one_process(source, expected, tmp_path):
    for name, text in {"sbatch": SBATCH, "retnet": f'#!/bin/sh\nexec "{sys.executable}" -m retnet.cli "$@"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "my tokens"
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "FAKE": str(tmp_path),
        "PARTS": "3", "CPUS_PER_PART": "1",
    }  # fmt: skip
    command = ["bash", str(FOLDER / "slurm_parts.sh"), str(source), str(out), *options("--")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "parts: job 42; merge: job 43, when all of them have ended well"
    assert contents(out) == expected
    assert (tmp_path / "dependencies").read_text() == "--dependency=afterok:42\n"
    parts = [line for line in done.stderr.splitlines() if "written" in line]
    assert [line.partition("part ")[2][:3] for line in parts] == ["3/3", "1/3", "2/3"]


@pytest.mark.parametrize(
    ("variables", "words", "message"),
    [
        ({}, ["a", "b"], "PARTS is ''; accepted: the number of parts"),
        ({"PARTS": "0"}, ["a", "b"], "PARTS is '0'; accepted: the number of parts"),
        ({"PARTS": "2"}, ["a", "--", "b"], "accepted: PARTS=N bash slurm_parts.sh SOURCE... OUT -- [options of"),
    ],
)
def test_the_slurm_script_demands_what_it_needs(variables, words, message):
    environment = {name: value for name, value in os.environ.items() if name != "PARTS"} | variables
    command = ["bash", str(FOLDER / "slurm_parts.sh"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_the_ray_script_writes_the_bytes_of_one_process(source, expected, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    script = [sys.executable, str(FOLDER / "ray_parts.py"), "4"]
    out = tmp_path / "my tokens"
    command = [*script, str(source), str(out), *options("--")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(out) == expected
    assert sorted(line.partition("part ")[2][:3] for line in done.stdout.splitlines() if "written" in line) == [
        f"{k}/4" for k in (1, 2, 3, 4)
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 2
    assert "my tokens exists; accepted: a new or empty folder" in done.stdout
