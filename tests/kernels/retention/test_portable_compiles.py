"""The portable kernels compile for the GPUs that their block shapes are for, on any machine.

A tile that exceeds a GPU's shared memory fails when it is first launched, and small problems take small tiles. So every
border-state tile of every architecture and dtype is compiled here, through the calls that launch it.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.absent_gpu import compiling
from retnet.kernels.architectures import ARCHITECTURES, Architecture
from retnet.kernels.device import stored_dtype
from retnet.kernels.retention import tile_model, tiles
from retnet.kernels.retention.portable import passes as portable
from retnet.kernels.retention.problem import RetentionProblem

COMPILED = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def use(monkeypatch):
    """use(architecture): from then on calls choose the kernels and tiles of that GPU."""

    def choose(hardware: Architecture) -> None:
        for module in [m for name, m in sys.modules.items() if name.startswith("retnet.kernels.retention")]:
            if hasattr(module, "architecture"):
                monkeypatch.setattr(module, "architecture", lambda device: hardware)
        if hardware.name.startswith("gfx"):
            monkeypatch.setattr(torch.version, "hip", "some")
        tiles.tiles_on.cache_clear()

    yield choose
    tiles.tiles_on.cache_clear()


def target(hardware: Architecture) -> tuple:
    name = hardware.name
    return ("hip", name, 64) if name.startswith("gfx") else ("cuda", int(name.removeprefix("sm_")), 32)


def run_both_ways(dtype: torch.dtype, G: int, K: int, V: int) -> None:
    """Forward and backward with everything that takes memory: decay per token and its gradient, both states."""
    T, H = 512, 2
    shapes = ((G, K), (G, K), (H, V))
    q, k, v = (torch.empty(1, T, heads, width, dtype=dtype, device="meta") for heads, width in shapes)
    state, log_decay = torch.empty(1, H, K, V, device="meta"), torch.empty(1, T, H, device="meta")
    problem = RetentionProblem(q, k, v, log_decay, 1.0, state=state)
    portable.portable_forward(problem, torch.float32)
    portable.portable_backward(problem, v, state, need_dlog_decay=True, need_dstate=True)


def widest_that_shares(hardware: Architecture, dtype: torch.dtype) -> int:
    """The largest head size for which heads that share queries and keys have kernels of their own."""
    stored = stored_dtype(dtype)
    return max(width for width in (16, 32, 64, 128) if tiles.shared_tile(hardware, stored, width, width, 64))


def spilled(kernel, path: Path) -> int:
    """Bytes per thread."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", kernel.asm["amdgcn"]).group(1))
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return 0
    path.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "share"),
    [*((name, False) for name in COMPILED), ("sm_80", True), ("sm_89", True), ("sm_90", True), ("gfx942", True)],
)
def test_every_tile_fits_the_shared_memory_of_its_architecture(name, share, dtype, use, monkeypatch):
    hardware = ARCHITECTURES[name]
    use(hardware)
    width = widest_that_shares(hardware, dtype) if share else 512
    candidates = tiles.state_tiles(hardware, dtype, width, width, 128)
    with compiling(*target(hardware)) as compiled:
        for tile in candidates:
            monkeypatch.setattr(tiles, "state_tiles", lambda *_, tile=tile: (tile,))
            tiles.tiles_on.cache_clear()
            run_both_ways(dtype, 1 if share else 2, width, width)
    needed = {(kernel_name, kernel.metadata.hash): kernel.metadata.shared for kernel_name, kernel in compiled}
    assert sum(kernel == "_border_states_kernel" for kernel, _ in needed) >= (1 if share else len(candidates))
    assert any(kernel in ("_read_kernel", "_sum_kernel") for kernel, _ in needed) == share
    assert {kernel: shared for kernel, shared in needed.items() if shared > hardware.shared} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "K", "V"), [(torch.bfloat16, 256, 512), (torch.float16, 64, 128)])
@pytest.mark.parametrize("name", [name for name in COMPILED if name != "sm_90"])
def test_the_tiles_of_the_model_need_no_more_than_it_says_and_hardly_spill(name, dtype, K, V, use, tmp_path):
    hardware = ARCHITECTURES[name]
    use(hardware)
    q, v = (torch.empty(8, 4096, 8, width, dtype=dtype, device="meta") for width in (K, V))
    problem = RetentionProblem(q, q, v, torch.empty(8, device="meta"), 1.0)
    chosen = portable.portable_tiles(problem)
    with compiling(*target(hardware)) as compiled:
        portable.portable_forward(problem, torch.float32)
        portable.portable_backward(problem, v, None, need_dlog_decay=False, need_dstate=False)
    state = tile_model.predict_state(hardware, chosen.state, dtype, K, V, chosen.segment)
    reads = [
        tile_model.predict_segment(hardware, tile, dtype, R, O, chosen.segment)
        for tile, R, O in ((chosen.key_contraction, K, V), (chosen.value_contraction, V, K))
    ]
    most = {"_border_states_kernel": state.shared, "_segment_kernel": max(read.shared for read in reads)}
    seen = {name for name, _ in compiled}
    assert seen >= most.keys()
    for kernel_name, kernel in compiled:
        if kernel_name in most:
            assert kernel.metadata.shared <= most[kernel_name], kernel_name
            assert spilled(kernel, tmp_path / "kernel.cubin") <= 64, kernel_name
