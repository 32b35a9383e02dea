"""Compiling kernels for a GPU that this process does not use, or that the machine does not have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from retnet.kernels.recording import launches_given_to


class AbsentGPU:
    """A stand-in for the driver of a GPU: enough for Triton to compile for it."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"absent {self.target}"  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(backend: str, name: int | str, lanes: int) -> Iterator[list[tuple[str, Any]]]:
    """In a `with` block, launches of this thread only compile, for the given target: "cuda", 80, 32 for instance.

    Yields a list to which every launch adds the kernel's name and what was compiled, also from tensors of the meta
    device. Tensors count as aligned to 16 bytes where their addresses are.
    """
    compiled: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> Any:
        result = kernel.warmup(*arguments, grid=grid, **options)
        compiled.append((kernel.fn.__name__, result))
        return result

    before = driver._active
    driver.set_active(AbsentGPU(GPUTarget(backend, name, lanes)))
    try:
        with launches_given_to(compile_only):
            yield compiled
    finally:
        driver._active = before
