"""The portable kernels compile for the GPUs that their block shapes are for, on any machine.

A tile that exceeds a GPU's shared memory fails when it is first launched, and small problems take small tiles. So every
border-state tile of every family and dtype is compiled here, through the calls that launch it.
"""

import sys

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from retnet.kernels.retention import tiles
from retnet.kernels.retention.portable import passes as portable
from retnet.kernels.retention.portable.border_states import stored_dtype
from retnet.kernels.retention.problem import RetentionProblem

# (compute capability, device family, bytes of shared memory per block)
HOPPER, ADA = (90, "hopper", 232448), (89, "small", 101376)


class AbsentGPU:
    """A stand-in for the driver of another GPU: enough to compile for it."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 1000 + self.capability  # no real device: Triton keeps compiled kernels by device number

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compile_for(monkeypatch):
    """compile_for(capability, family): from then on launches only compile; returns the list of (name, kernel)."""
    launched = []

    def use(capability: int, family: str) -> list:
        run = JITFunction.run

        def compile_only(self, *args, grid, warmup, **options):
            launched.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

        monkeypatch.setattr(driver, "_active", AbsentGPU(capability))
        monkeypatch.setattr(JITFunction, "run", compile_only)
        for module in [m for name, m in sys.modules.items() if name.startswith("retnet.kernels.")]:
            if hasattr(module, "device_family"):
                monkeypatch.setattr(module, "device_family", lambda device: family)
        tiles.tiles_on.cache_clear()
        return launched

    yield use
    tiles.tiles_on.cache_clear()


def run_both_ways(dtype: torch.dtype, G: int, K: int, V: int) -> None:
    """Forward and backward with everything that takes memory: decay per token and its gradient, both states."""
    T, H = 512, 2
    q, k, v = (torch.empty(1, T, heads, width, dtype=dtype) for heads, width in ((G, K), (G, K), (H, V)))
    state = torch.empty(1, H, K, V)
    problem = RetentionProblem(q, k, v, -torch.ones(1, T, H), 1.0, state=state)
    portable.portable_forward(problem, torch.float32)
    portable.portable_backward(problem, v, state, need_dlog_decay=True, need_dstate=True)


def widest_that_shares(family: str, dtype: torch.dtype) -> int:
    """The largest head size for which heads that share queries and keys have kernels of their own."""
    stored = stored_dtype(dtype)
    return max(width for width in (16, 32, 64, 128) if tiles.shared_tile(family, stored, width, width, 64))


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("capability", "family", "limit"), [HOPPER, ADA])
def test_every_tile_fits_the_shared_memory_of_its_family(
    capability, family, limit, dtype, share, compile_for, monkeypatch
):
    launched = compile_for(capability, family)
    width = widest_that_shares(family, dtype) if share else 512
    candidates = tiles.state_tiles(family, dtype, width, width)
    for tile in candidates:
        monkeypatch.setattr(tiles, "state_tiles", lambda *_, tile=tile: (tile,))
        tiles.tiles_on.cache_clear()
        run_both_ways(dtype, 1 if share else 2, width, width)
    needed = {(name, kernel.metadata.hash): kernel.metadata.shared for name, kernel in launched}
    assert sum(name == "_border_states_kernel" for name, _ in needed) >= (1 if share else len(candidates))
    assert any(name in ("_read_kernel", "_sum_kernel") for name, _ in needed) == share
    assert {name: shared for name, shared in needed.items() if shared > limit} == {}
