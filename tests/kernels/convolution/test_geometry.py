"""The geometry of the short convolution, by architecture."""

import pytest

pytest.importorskip("triton")

from retnet.kernels.architectures import ARCHITECTURES, MEASURED
from retnet.kernels.convolution.geometry import Geometry, geometry, registers


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_every_architecture_keeps_the_channels_of_a_thread_and_fills_its_multiprocessors(width, backward):
    for hardware in ARCHITECTURES.values():
        chosen = geometry(width, 1 << 20, 4096, backward=backward, hardware=hardware)
        needed = registers(width, chosen.rows, backward)
        assert chosen.channels == 4 * chosen.warps * hardware.lanes
        assert needed <= hardware.most_registers
        room = min(hardware.warps, hardware.registers // (hardware.lanes * needed))
        assert chosen.warps * hardware.programs >= room
        assert chosen.warps == 1 or chosen.warps // 2 * hardware.programs < room, "more warps than needed"


def test_the_measured_geometry_is_kept():
    assert geometry(4, 1 << 20, 4096, backward=False, hardware=ARCHITECTURES[MEASURED]) == Geometry(64, 128, 4)
    assert geometry(4, 1 << 20, 4096, backward=True) == Geometry(128, 128, 8)
    assert geometry(8, 1 << 20, 4096, backward=True) == Geometry(128, 128, 4)


def test_a_larger_gpu_gets_shorter_segments_of_a_small_call():
    small, large = (
        geometry(4, 4096, 512, backward=True, hardware=ARCHITECTURES[name]).segment for name in ("sm_80", "gfx942")
    )
    assert large <= small <= 128
