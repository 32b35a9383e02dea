"""The device of the kernel tests: the GPU, or the CPU in Triton's interpreter, chosen before triton is imported."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if INTERPRETED:
        return "cpu"
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1 (test_interpreter.py runs these tests with it)")


if INTERPRETED:
    from triton.runtime import interpreter

    from tests.kernels.faster_interpreter import speed_up

    speed_up(interpreter)
