"""The device of the kernel tests: the GPU, or the CPU in Triton's interpreter, chosen before triton is imported."""

import os
from types import ModuleType

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


def patch_once_per_launch(interpreter: ModuleType) -> None:
    """Makes Triton's interpreter twice as fast.

    It replaces the functions of `triton.language` by its own at a launch, and again at every call of a device function,
    which changes nothing more but takes half of the time.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # namespaces of the functions that the current launch has called

    def patch_lang(fn):
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    def call(self, *args, **kwargs):
        patched.clear()  # a launch puts the language back when it ends
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


if INTERPRETED:
    from triton.runtime import interpreter

    patch_once_per_launch(interpreter)
