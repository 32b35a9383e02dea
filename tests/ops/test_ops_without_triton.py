"""The operator on machines without Triton (macOS, plain installs)."""

import subprocess
import sys
from pathlib import Path

import pytest

HIDDEN = "import sys; sys.modules['triton'] = None; "


def run_without_triton(code: str) -> str:
    """The output of Python code in a process where importing triton fails."""
    run = subprocess.run([sys.executable, "-c", HIDDEN + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout


def test_retention_its_plan_and_a_gpus_chunk_size_need_no_triton():
    printed = run_without_triton(
        "import torch, retnet; from retnet.ops.retention import chunk_tokens; "
        "x = torch.randn(1, 70, 2, 16, requires_grad=True); decay = torch.tensor([-0.1, -0.01]); "
        "out, state = retnet.retention(x, x, x, decay, chunk_size=32); (out.sum() + state.sum()).backward(); "
        "retnet.retention_step_(x.detach()[:, :1], x.detach()[:, :1], x.detach()[:, :1], decay, state.detach()); "
        "assert x.grad.isfinite().all(); "
        "print(retnet.retention_plan(x, x, chunk_size=32).chunk_size, "
        "chunk_tokens(70, 16, 16, dtype=torch.bfloat16, device='cuda', chunk_size=100))"
    )
    assert printed.split() == ["32", "128"]


@pytest.mark.slow
def test_the_tests_of_the_operator_need_no_triton():
    module = str(Path(__file__).with_name("test_retention.py"))
    options = ["-q", "-x", "-m", "not gpu and not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    printed = run_without_triton(f"import pytest; sys.exit(pytest.main({[*options, module]!r}))")
    assert " passed" in printed
