"""Throughput and utilisation: what is counted, and relative to which peak."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from retnet.models.cost import model_cost
from retnet.models.presets import preset
from retnet.ops.device import num_threads
from retnet.stack.resolve import resolve_config
from retnet.train import throughput
from retnet.train.batches import BatchFacts
from retnet.train.throughput import Meter, Peak, device_peak, flops_per_token, memory_gib

CPU = torch.device("cpu")


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def test_a_reading_covers_the_tokens_and_time_since_the_last_one(clock):
    config = preset("retnet-tiny")
    meter = Meter(config, Peak(1e12, "a device"), num_processes=4)
    assert meter.read() == {}
    for _ in range(2):
        meter.count(BatchFacts((0,), 900, seen=1000 * 500, num_tokens=1000))
        meter.waited(0.01)
        clock.seconds += 0.25
    reading = meter.read()
    assert reading["tokens_per_second"] == pytest.approx(4 * 2000 / 0.5)
    assert reading["mfu"] == pytest.approx(2000 / 0.5 * model_cost(config, 500).training_flops / 1e12)
    assert reading["data_wait"] == pytest.approx(0.02 / 0.5)
    assert (meter.total_seconds, meter.total_waited) == pytest.approx((0.5, 0.02))
    clock.seconds += 1.0
    assert meter.read() == {}  # no tokens
    meter.count(BatchFacts((0,), 900, seen=1000 * 500, num_tokens=1000))
    clock.seconds += 0.5
    assert meter.read()["tokens_per_second"] == pytest.approx(4 * 1000 / 0.5)
    assert (meter.total_seconds, meter.total_waited) == pytest.approx((1.0, 0.02))


def test_time_for_validation_and_checkpoints_does_not_count(clock):
    meter = Meter(preset("retnet-tiny"), Peak(1e12, "a device"), num_processes=1)
    meter.count(BatchFacts((0,), 900, seen=1000 * 500, num_tokens=1000))
    clock.seconds += 10.0
    meter.pause(6.0)
    meter.pause(3.0)
    assert meter.read()["tokens_per_second"] == pytest.approx(1000)
    assert meter.total_seconds == pytest.approx(1.0)
    meter.count(BatchFacts((0,), 900, seen=1000 * 500, num_tokens=1000))
    clock.seconds += 2.0  # the pauses above are those of the first reading
    assert meter.read()["tokens_per_second"] == pytest.approx(500)


def test_a_restart_forgets_tokens_and_time(clock):
    meter = Meter(preset("retnet-tiny"), Peak(1e12, "a device"), num_processes=1)
    meter.count(BatchFacts((0,), 900, seen=1000 * 500, num_tokens=1000))
    clock.seconds += 10.0
    meter.restart()
    assert meter.read() == {}
    meter.count(BatchFacts((0,), 900, seen=1000 * 500, num_tokens=1000))
    clock.seconds += 2.0
    assert meter.read()["tokens_per_second"] == pytest.approx(500)


def test_attention_is_counted_within_documents():
    """Documents of 100 and 300 tokens in a row of 400 cost as much as in two rows."""
    config = resolve_config("arch_beginner_llama_mini")
    packed = 400 * flops_per_token(config, 400, 100**2 + 300**2)
    apart = sum(n * model_cost(config, n).training_flops for n in (100, 300))
    assert packed == pytest.approx(apart, rel=1e-9)
    assert packed < 400 * model_cost(config, 400).training_flops


def test_a_known_gpu_has_its_vendors_rate(monkeypatch):
    gpu = torch.device("cuda", 0)
    for name, rate in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak = device_peak(gpu, torch.bfloat16)
        assert peak.rate == rate
        assert "vendor's" in peak.source


def test_other_devices_are_measured_and_the_source_says_so(monkeypatch):
    state = torch.get_rng_state()
    peak = device_peak(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < peak.rate < 1e15
    assert peak.source.startswith(f"cpu, {num_threads()}, float32 product measured at")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard-of 1")
    monkeypatch.setattr(throughput, "_product_rate", lambda device, dtype: 5e12)
    assert device_peak(torch.device("cuda", 0), torch.bfloat16) == Peak(
        5e12, "Unheard-of 1, bfloat16 product measured at 5 TFLOP/s", "cuda"
    )


@pytest.mark.parametrize(("half", "named"), [(0.01e12, "float32 product"), (0.3e12, "bfloat16 product")])
def test_the_peak_in_half_precision_is_at_least_that_of_float32_on_a_cpu(monkeypatch, half, named):
    """A CPU that emulates bfloat16 runs the rest of the model faster than its products: MFU would exceed 100%."""
    rates = {torch.bfloat16: half, torch.float32: 0.1e12, torch.float64: 0.05e12}
    monkeypatch.setattr(throughput, "_product_rate", lambda device, dtype: rates[dtype])
    peak = device_peak(CPU, torch.bfloat16)
    assert peak.rate == max(half, 0.1e12)
    assert named in peak.source
    assert device_peak(CPU, torch.float64).rate == 0.05e12


def test_time_that_other_processes_take_does_not_lower_the_measured_rate(monkeypatch):
    monkeypatch.setattr(throughput, "_PRODUCT_SECONDS", 0.02)
    alone, product = device_peak(CPU, torch.float32).rate, torch.mm

    def delayed(a, b):
        time.sleep(0.1)  # about ten times as long as the product
        return product(a, b)

    monkeypatch.setattr(torch, "mm", delayed)
    threads = torch.get_num_threads()
    assert device_peak(CPU, torch.float32).rate > alone / 3
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with Linux's own count")
def test_memory_is_the_peak_of_the_process():
    held = torch.ones(2**27, dtype=torch.uint8)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert memory_gib(CPU) == pytest.approx(int(peak.group(1)) / 2**20, rel=0.02)
    assert memory_gib(CPU) > held.nbytes / 2**30
