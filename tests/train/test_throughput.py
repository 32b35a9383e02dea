"""Speed and utilisation: what is counted, and what they are of."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from retnet.models.cost import model_cost
from retnet.models.presets import preset
from retnet.stack.resolve import resolve_config
from retnet.train import throughput
from retnet.train.batches import BatchFacts
from retnet.train.throughput import Meter, Peak, device_peak, flops_per_token, memory_gib

CPU = torch.device("cpu")


def test_utilisation_is_the_models_operations_over_the_peak():
    config = preset("retnet-tiny")
    meter = Meter(config, Peak(1e12, "a device"), num_processes=4)
    meter.count(BatchFacts((0,), 900, seen=1000 * 500, num_tokens=1000))
    meter.waited(0.01)
    time.sleep(0.1)
    meter.pause(0.05)
    reading = meter.read()
    rate = reading["tokens_per_second"]
    assert 4 * 1000 / 0.5 < rate < 4 * 1000 / 0.05
    assert reading["mfu"] == pytest.approx(rate / 4 * model_cost(config, 500).training_flops / 1e12)
    assert reading["data_wait"] == pytest.approx(0.01 * rate / 4 / 1000)
    assert meter.read() == {}


def test_attention_is_counted_over_the_documents_that_it_sees():
    """Two documents of 100 and 300 tokens in a row of 400: work as the sum of theirs, not that of 400."""
    config = resolve_config("arch_beginner_llama_mini")
    packed = 400 * flops_per_token(config, 400, 100**2 + 300**2)
    apart = sum(n * model_cost(config, n).training_flops for n in (100, 300))
    assert packed == pytest.approx(apart, rel=1e-9)
    assert packed < 400 * model_cost(config, 400).training_flops


def test_a_known_gpu_is_compared_with_its_vendors_rate(monkeypatch):
    gpu = torch.device("cuda", 0)
    for name, rate in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak = device_peak(gpu, torch.bfloat16)
        assert peak.rate == rate
        assert "vendor's" in peak.source


def test_anything_else_is_measured_and_said_so(monkeypatch):
    state = torch.get_rng_state()
    peak = device_peak(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < peak.rate < 1e15
    assert peak.source.startswith(f"cpu, {torch.get_num_threads()} threads, float32 product measured at")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard-of 1")
    monkeypatch.setattr(throughput, "_product_rate", lambda device, dtype: 5e12)
    assert device_peak(torch.device("cuda", 0), torch.bfloat16) == Peak(
        5e12, "Unheard-of 1, bfloat16 product measured at 5 TFLOP/s"
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' own count")
def test_memory_is_the_peak_of_the_process():
    held = torch.ones(2**27, dtype=torch.uint8)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert memory_gib(CPU) == pytest.approx(int(peak.group(1)) / 2**20, rel=0.02)
    assert memory_gib(CPU) > held.nbytes / 2**30
