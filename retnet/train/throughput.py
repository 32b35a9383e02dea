"""Throughput of a run: tokens per second, model FLOP utilisation (MFU), time spent waiting for batches, memory.

MFU is the operations that the model needs (`models/cost.py`, without recomputation) per second, divided by the peak
rate of the devices. The peak is the vendor's dense rate for a known GPU, and the measured rate of a matrix product for
other devices; the log says which. On a CPU that is the rate of one thread per second of processor time, times the
threads: by the clock it would be many times too low while other processes compete for the cores. For half precision it
is at least the rate in float32, which is 30 times higher on CPUs that emulate half precision. Attention is counted
within documents, not over whole rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from retnet.models.config import ModelConfig
from retnet.models.cost import model_cost
from retnet.ops.device import num_threads
from retnet.system.memory import peak_bytes
from retnet.train.batches import BatchFacts

# Vendors' dense matrix rates in bfloat16, operations per second, for the first name that the device's name contains.
PEAK_RATES = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}
_PRODUCT = 768  # rows and columns of the measured product on a CPU; small, as some CPUs emulate bfloat16
_PRODUCT_SECONDS = 0.5
_PRODUCT_GPU = 8192


@dataclass(frozen=True)
class Peak:
    """The peak rate of one device, in operations per second, the source of the number, and the device's type."""

    rate: float
    source: str
    device: str = "cpu"


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The vendor's rate for bfloat16 and float16 on a known GPU; otherwise the measured rate of a product.

    On a CPU that is the faster of the products in `dtype` and in float32.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        for known, rate in PEAK_RATES.items():
            if known in name:
                return Peak(rate, f"{known} dense bfloat16, vendor's {rate / 1e12:.0f} TFLOP/s", device.type)
    dtypes = [dtype]
    if device.type != "cuda" and dtype.itemsize < torch.float32.itemsize:
        dtypes.append(
            torch.float32
        )  # many CPUs only emulate half precision, and a model is not in half precision alone
    rates = {dtype: _product_rate(device, dtype) for dtype in dtypes}
    dtype = max(rates, key=lambda dtype: rates[dtype])
    rate, kind = rates[dtype], str(dtype).removeprefix("torch.")
    threads = "" if device.type == "cuda" else f", {num_threads()}"
    return Peak(rate, f"{name}{threads}, {kind} product measured at {rate / 1e12:.3g} TFLOP/s", device.type)


@torch.no_grad()
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of the fastest of several square products. It draws no random numbers, which a run depends on."""
    size = _PRODUCT_GPU if device.type == "cuda" else _PRODUCT
    a = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    if device.type == "cuda":
        return 2 * size**3 / _fastest(lambda: (torch.mm(a, a), synchronize(device)), time.perf_counter)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 2 * size**3 * threads / _fastest(lambda: torch.mm(a, a), time.thread_time)
    finally:
        torch.set_num_threads(threads)


def _fastest(run: Callable[[], object], now: Callable[[], float]) -> float:
    """Seconds of the fastest of several runs after the first."""
    run()
    times: list[float] = []
    while len(times) < 2 or (len(times) < 50 and sum(times) < _PRODUCT_SECONDS):
        begin = now()
        run()
        times.append(max(now() - begin, 1e-9))
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_bytes() / 2**30


class Meter:
    """Tokens and time since the last reading, without the time of validation and checkpoints (`pause`).

    num_processes: this process's counts are scaled by it, as all processes do equal work. trains_weights: False leaves
        out the gradients of the weights, half of the backward.
    """

    def __init__(self, config: ModelConfig, peak: Peak, num_processes: int, *, trains_weights: bool = True):
        self.peak, self._share = peak, 1.0 if trains_weights else 2 / 3
        self._config, self._num_processes = config, num_processes
        self.total_waited = self.total_seconds = 0.0
        self._reset()

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for batches."""
        self._waited += seconds

    def count(self, facts: BatchFacts) -> None:
        """Add the tokens of a batch."""
        self._tokens += facts.num_tokens
        self._seen += facts.seen

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training steps."""
        self._paused += seconds

    def restart(self) -> None:
        """Start counting again from zero."""
        self._reset()

    def read(self) -> dict[str, float]:
        """Values for the log, over the time since the last reading; {} if no tokens were counted."""
        seconds = time.perf_counter() - self._began - self._paused
        tokens, seen, waited = self._tokens, self._seen, self._waited
        self._reset()
        if not tokens or seconds <= 0:
            return {}
        self.total_seconds += seconds
        self.total_waited += waited
        rate = tokens / seconds
        return {
            "tokens_per_second": rate * self._num_processes,
            "mfu": rate * self.flops_per_token(tokens, seen) / self.peak.rate,
            "data_wait": waited / seconds,
        }

    def flops_per_token(self, num_tokens: int, seen: int) -> float:
        """Operations of this run per token; arguments as for the function of this name."""
        return self._share * flops_per_token(self._config, num_tokens, seen, self.peak.device)

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._waited = self._paused = 0.0
        self._tokens = self._seen = 0


def flops_per_token(config: ModelConfig, num_tokens: int, seen: int, device: str = "cpu") -> float:
    """Operations per token, forward and backward; `seen` is the sum of the squared lengths of the document pieces.

    device: the type of the device, which decides the tokens per chunk.

    The work of attention grows with the square of a piece's length, so the mean over tokens is that of one length,
    `seen / num_tokens`.
    """
    return model_cost(config, max(1, round(seen / num_tokens)), device).training_flops
