"""Memory readings of this process."""

import re
import sys
from pathlib import Path

import pytest

from retnet.system import memory
from retnet.system.memory import peak_bytes, resident_bytes, total_bytes

STATUS = Path("/proc/self/status")
linux = pytest.mark.skipif(not STATUS.exists(), reason="compares with Linux's own counts")


def status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text()).group(1))


@linux
def test_readings_are_those_of_the_kernel():
    assert resident_bytes() == pytest.approx(status("VmRSS"), rel=0.05)
    assert peak_bytes() == pytest.approx(status("VmHWM"), rel=0.05)


@linux
def test_memory_in_use_counts_and_the_peak_remains_after_it_is_freed():
    before, size = resident_bytes(), 1 << 28
    held = bytearray(size)
    held[::4096] = b"\1" * len(held[::4096])
    during = resident_bytes()
    assert during - before == pytest.approx(size, rel=0.1)
    assert peak_bytes() >= 0.99 * during  # the kernel updates the two at different times
    del held
    assert resident_bytes() < during - size / 2
    assert peak_bytes() >= 0.99 * during


def test_without_proc_the_peak_stands_for_the_current_size(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATM", tmp_path / "absent")
    assert resident_bytes() == peak_bytes() > 0


def test_macos_counts_in_bytes(monkeypatch):
    before = peak_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_bytes() == pytest.approx(before / 1024, rel=0.1)


def test_windows_has_no_resource_module_and_nothing_fails(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(memory, "_STATM", tmp_path / "absent")
    assert peak_bytes() == resident_bytes() == 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="compares with Linux's own count")
def test_the_memory_of_the_machine_is_that_of_the_kernel():
    kib = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text()).group(1)
    assert total_bytes() == pytest.approx(1024 * int(kib), rel=0.01)
