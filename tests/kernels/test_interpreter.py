"""Runs the kernel tests on the CPU: in a process of their own, since Triton decides at import whether it interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


SLOW = ["retention/test_dispatch.py", "decode/test_recurrent.py", "decode/test_decode.py"]
MODULES = [
    *SLOW,
    "convolution/test_short.py",
    "decode/test_short_convolution.py",
    "retention/test_dispatch_chunk_size.py",
    "retention/hopper/test_token_codes.py",
    "retention/hopper/test_dk_dv.py",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel tests run on it")
@pytest.mark.parametrize(
    ("module", "marks"),
    [
        *(pytest.param(module, "not gpu and not slow", id=module) for module in MODULES),
        *(pytest.param(module, "slow and not gpu", id=f"{module}, slow", marks=pytest.mark.slow) for module in SLOW),
        pytest.param("scan/test_scan.py", "not gpu", id="scan/test_scan.py", marks=pytest.mark.slow),
    ],
)
def test_kernels_agree_with_the_oracle_in_the_interpreter(module, marks):
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(
        [*command, str(Path(__file__).parent / module)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
    assert "skipped" not in run.stdout
