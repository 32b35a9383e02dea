"""GPU architectures: the registers, shared memory and rates of their multiprocessors.

Block shapes were measured on sm_90. On every other architecture a model of these numbers chooses them
(`retention/tile_model.py`). Sources: the tables of compute capabilities in NVIDIA's CUDA programming guide, AMD's guide
to the instruction set of CDNA3, and the makers' data sheets of the GPU named beside each row.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """One multiprocessor (AMD: compute unit), and the whole of a usual GPU.

    shared, shared_in_all: bytes of shared memory per program, and of all programs together. registers: 32-bit ones of
    all programs; most_registers: of one thread. lanes: threads per warp. warps, programs: resident at once, at most.
    processors, tflops (16-bit products), bandwidth of memory and of the caches (TB/s): of the whole GPU.
    """

    name: str
    shared: int
    shared_in_all: int
    registers: int
    most_registers: int
    lanes: int
    warps: int
    programs: int
    processors: int
    tflops: float
    bandwidth: float
    cache_bandwidth: float

    @property
    def asynchronous_products(self) -> bool:
        """Whether matrix products read both operands from shared memory while the program goes on (wgmma, tcgen05)."""
        return self.name.startswith(("sm_90", "sm_10"))


MEASURED = "sm_90"

ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("sm_80", 163 * KIB, 164 * KIB, 65536, 255, 32, 64, 32, 108, 312, 2.0, 4.5),  # A100
        Architecture("sm_86", 99 * KIB, 100 * KIB, 65536, 255, 32, 48, 16, 84, 150, 0.7, 2.5),  # A40
        Architecture("sm_89", 99 * KIB, 100 * KIB, 65536, 255, 32, 48, 24, 142, 362, 0.86, 4.0),  # L40S
        Architecture("sm_90", 227 * KIB, 228 * KIB, 65536, 255, 32, 64, 32, 132, 800, 4.3, 6.5),  # H200
        Architecture("sm_100", 227 * KIB, 228 * KIB, 65536, 255, 32, 64, 32, 148, 2250, 8.0, 9.0),  # B200
        Architecture("sm_120", 99 * KIB, 100 * KIB, 65536, 255, 32, 48, 24, 170, 420, 1.8, 6.0),  # RTX 5090
        Architecture("gfx90a", 64 * KIB, 64 * KIB, 131072, 512, 64, 32, 32, 104, 180, 1.6, 3.5),  # a half of MI250X
        Architecture("gfx942", 64 * KIB, 64 * KIB, 131072, 512, 64, 32, 32, 304, 1300, 5.3, 10.0),  # MI300X
    )
}
_SAME = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}  # but for numbers that the device itself gives


@cache
def architecture(device: torch.device) -> Architecture | None:
    """The architecture of a device; None on a CPU. What is not in the table is read from the device's properties."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        return ARCHITECTURES.get(name) or replace(ARCHITECTURES["gfx90a"], name=name)
    name = f"sm_{properties.major}{properties.minor}"
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    nearest = ARCHITECTURES[_SAME.get(name, "sm_86")]
    shared = properties.shared_memory_per_block_optin
    in_all = max(shared, properties.shared_memory_per_multiprocessor)
    return replace(nearest, name=name, shared=shared, shared_in_all=in_all)
