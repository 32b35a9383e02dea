"""Runs the kernel tests on the CPU: in processes of their own, since Triton decides at import whether it interprets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
# They share a process, whose start takes as long as a module.
FAST = [
    "retention/test_dispatch.py",
    "retention/test_dispatch_chunk_size.py",
    "retention/hopper/test_token_codes.py",
    "retention/hopper/test_token_sums.py",
    "retention/hopper/test_walk_emulated.py",
    "retention/hopper/test_dk_dv.py",
    "decode/test_recurrent.py",
    "decode/test_decode.py",
    "decode/test_short_convolution.py",
    "convolution/test_short.py",
]
SLOW = [
    "retention/test_dispatch.py",
    "retention/hopper/test_walk_emulated.py",
    "decode/test_recurrent.py",
    "decode/test_decode.py",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel tests run on it")
@pytest.mark.parametrize(
    ("modules", "marks"),
    [
        pytest.param(FAST, "not gpu and not slow", id="fast"),
        *(pytest.param([module], "slow and not gpu", id=f"{module}, slow", marks=pytest.mark.slow) for module in SLOW),
        pytest.param(["scan/test_scan.py"], "not gpu", id="scan/test_scan.py", marks=pytest.mark.slow),
        pytest.param(["test_kernels_far_offsets.py"], "not gpu", id="far offsets", marks=pytest.mark.slow),
    ],
)
def test_kernels_agree_with_the_oracle_in_the_interpreter(modules, marks):
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-m", marks, "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    files = [str(FOLDER / module) for module in modules]
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = set(re.findall(r"^PASSED tests/kernels/([\w/]+\.py)::", run.stdout, re.MULTILINE))
    assert passed == set(modules)
    assert "skipped" not in run.stdout
