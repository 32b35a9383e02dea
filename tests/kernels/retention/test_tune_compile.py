"""The pool of compilers, with small scripts as compilers: answers, crashes and the budget."""

import json
import sys
import time

import pytest

pytest.importorskip("triton")

from retnet.kernels.retention.tile_shapes import StateTile
from retnet.kernels.retention.tune_compile import Compilers, serve
from retnet.kernels.retention.tune_search import Job

JOBS = [Job("state", 64, StateTile(32, 32, 32, 4, stages)) for stages in (2, 3, 4)]


def compiled(script: str, seconds_left=lambda: 60.0, processes=2) -> dict[Job, str | None]:
    with Compilers(64, 64, "bfloat16", ("cuda", 90, 32), processes) as compilers:
        compilers._command = [sys.executable, "-S", "-c", "import json, sys, time\n" + script]
        return dict(compilers.compiled(JOBS, seconds_left))


def test_every_job_gets_its_own_answer():
    script = """for line in sys.stdin:
        stages = json.loads(line)[2]["stages"]
        print(json.dumps(f"no {stages}" if stages == 3 else None), flush=True)"""
    assert compiled(script) == {JOBS[0]: None, JOBS[1]: "no 3", JOBS[2]: None}


def test_a_compiler_that_crashes_refuses_its_tile_and_is_replaced():
    script = "for line in sys.stdin:\n if json.loads(line)[2]['stages'] == 3: sys.exit(1)\n print('null', flush=True)"
    assert compiled(script, processes=1) == {JOBS[0]: None, JOBS[1]: "the compiler crashed", JOBS[2]: None}


def test_compilers_that_cannot_start_leave_the_work_to_the_caller():
    assert compiled("sys.exit(1)") == dict.fromkeys(JOBS)


def test_nothing_waits_beyond_the_budget():
    end = time.monotonic() + 0.5
    assert compiled("time.sleep(60)", lambda: end - time.monotonic()) == {}
    assert time.monotonic() < end + 5


@pytest.mark.slow
def test_a_compiler_compiles_without_a_gpu_and_names_what_it_refuses(monkeypatch, capsys):
    lines = [
        ["state", 64, vars(StateTile(32, 32, 32, 4, 2))],
        ["state", 64, vars(StateTile(32, 48, 32, 4, 2))],  # no power of two
    ]
    monkeypatch.setattr(sys, "stdin", iter(json.dumps(line) for line in lines))
    serve([json.dumps([64, 64, "bfloat16", "cuda", 90, 32])])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[0] is None
    assert "power of 2" in answers[1]
