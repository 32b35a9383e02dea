"""The runner of all benchmarks: timing, peak memory, the device's limits, CSV rows with device and versions.

Device time on a GPU is the median over replays of a captured graph, without launch overhead. Host time, a column of
its own, is the cost of launching the same work; an eager caller waits for the longer of the two. On a CPU, time is the
host's clock. The floor of a point is the larger of two times: its bytes at the copy bandwidth, its operations at the
rate of a large matrix product. Both rates are measured in the same run.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from retnet.system.machine import package_versions, source_commit
from retnet.system.sizes import format_bytes

C = TypeVar("C")  # a case of a benchmark


@dataclass(frozen=True)
class Point:
    """One measured point. `milliseconds` is inf if the measurement failed (`note` says why), nan if nothing was timed.

    extra_bytes: memory; each benchmark says which.
    """

    bench: str
    case: str
    implementation: str
    what: str
    milliseconds: float
    floor_milliseconds: float | None = None
    host_milliseconds: float | None = None
    eager_milliseconds: float | None = None
    extra_bytes: float | None = None
    note: str = ""
    certificate: dict[str, str] = field(default_factory=dict)

    @property
    def share_of_floor(self) -> float | None:
        return None if self.floor_milliseconds is None else self.floor_milliseconds / self.milliseconds


@cache
def certificate() -> dict[str, str]:
    """The origin of a number: device, threads, versions, commit, command, date."""
    packages = ("triton", "flash-linear-attention", "retnet")
    versions = package_versions(packages)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": "" if torch.cuda.is_available() else str(torch.get_num_threads()),
        "torch": torch.__version__,
        **{package.replace("-", "_"): versions.get(package, "") for package in packages},
        "commit": source_commit(),
        "command": shlex.join(["python", *(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv))]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def arguments(doc: str | None, *, csv: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with --csv (default: no file)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = None if csv is None else Path(csv)
    parser.add_argument("--csv", type=Path, default=path, metavar="FILE", help=f"append rows to FILE (default: {path})")
    return parser


def need_gpu() -> None:
    """Exit with a message if there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark measures a GPU, and PyTorch finds none; accepted: a machine with CUDA or ROCm")


def join_processes(*, on_cpu: bool) -> torch.device:
    """Join the processes of torchrun. Returns the device of this one: a GPU of its own, or the CPU if there is none."""
    if on_cpu or not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    return device


def installed(module: str, package: str, install: str = "") -> bool:
    """Is a rival installed? Prints that it is left out if not. `module` is its import name."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"{package} is not installed{f' (pip install {install})' if install else ''}: left out")
    return found


def fla_installed() -> bool:
    return installed("fla", "flash-linear-attention", "-e '.[bench]'")


def report(points: Iterable[Point], path: Path | None) -> list[Point]:
    """Print and append each point as soon as it is measured, so that an interrupted run keeps its points.

    These lines are the progress of a benchmark: a bar that is drawn beside a measurement would disturb it.
    """
    done = []
    for point in points:
        print(table([point]), flush=True)
        if path is not None:
            append(path, [point])
        done.append(point)
    return done


def failed(bench: str, case: str, implementation: str, what: str, error: Exception) -> Point:
    """The point of a measurement that ended with an error."""
    return Point(bench, case, implementation, what, float("inf"), note=str(error).splitlines()[0][:100])


def report_cases(
    bench: str, cases: Iterable[C], implementations: Sequence[str], measure: Callable[[C, str], list[Point]],
    path: Path | None,
) -> None:  # fmt: skip
    """`report` every implementation of every case on a GPU. One that fails has a row, and FLA is left out if absent."""
    for case in cases:
        for implementation in implementations:
            if implementation == "fla" and not fla_installed():
                continue
            try:
                points = measure(case, implementation)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                points = [failed(bench, str(case), implementation, "failed", error)]
            report(points, path)
            torch.cuda.empty_cache()


def append(path: Path, points: list[Point]) -> None:
    """Append rows to a CSV file, with a header if the file is new."""
    names = [f.name for f in fields(Point) if f.name != "certificate"] + ["share_of_floor", *certificate()]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if new:
            writer.writeheader()
        for point in points:
            row = {k: v for k, v in asdict(point).items() if k != "certificate"}
            writer.writerow({**row, "share_of_floor": point.share_of_floor, **certificate()})


def read(path: Path) -> list[Point]:
    """The rows of a CSV file that `append` wrote."""
    texts = ("bench", "case", "implementation", "what", "note")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = [f.name for f in fields(Point) if f.name not in (*texts, "certificate")]
    own = (*texts, *numbers, "share_of_floor")
    return [
        Point(
            **{k: row[k] for k in texts},
            **{k: float(row[k]) if row[k] else None for k in numbers},  # type: ignore[arg-type]
            certificate={k: value for k, value in row.items() if value and k not in own},
        )
        for row in rows
    ]


def origin(points: Sequence[Point]) -> tuple[str, ...]:
    """Hardware, torch, date and commit of points for a caption; several are joined by 'and'."""

    def all_of(key: str) -> str:
        return " and ".join(filter(None, dict.fromkeys(p.certificate.get(key, "") for p in points)))

    def with_name(name: str, values: str, end: str = "") -> str:
        return f"{name}{values}{end}" if values else ""

    dates = sorted({p.certificate["date"].split()[0] for p in points if p.certificate.get("date")})
    return (
        all_of("device"),
        with_name("", all_of("threads"), " thread" if all_of("threads") == "1" else " threads"),
        with_name("torch ", all_of("torch")),
        " to ".join(dates[:: max(1, len(dates) - 1)]),
        with_name("commit ", all_of("commit")),
    )


def table(points: list[Point]) -> str:
    """Points as aligned text, one line each."""
    lines = []
    for p in points:
        share = "" if p.share_of_floor is None else f"{p.share_of_floor:6.1%} of floor"
        host = "" if p.host_milliseconds is None else f"host {p.host_milliseconds:7.3f} ms"
        host += "" if p.eager_milliseconds is None else f" eager {p.eager_milliseconds:8.3f} ms"
        memory = "" if p.extra_bytes is None else f"{format_bytes(p.extra_bytes):>10s}"
        name = f"{p.case:26s} {p.implementation:10s} {p.what:17s}"
        lines.append(f"{name} {p.milliseconds:10.4f} ms {share:15s} {host} {memory} {p.note}")
    return "\n".join(lines)


def profile_table(step: Callable[[], object], steps: int, rows: int, device: torch.device) -> str:
    """Time per kernel of a step on a GPU, per operator on a CPU, the longest first."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = [e for e in profiled.key_averages() if (e.device_type == DeviceType.CUDA) == on_gpu]
    taken = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / steps for e in events}
    calls = sum(e.count for e in events) / steps
    unit = "kernels" if on_gpu else "operators"
    lines = [f"{calls:.0f} {unit} per step, {sum(taken.values()) / 1e3:.3f} ms in total"]
    for e in sorted(events, key=lambda e: -taken[e.key])[:rows]:
        each = taken[e.key] / max(1.0, e.count / steps)
        lines.append(f"{taken[e.key]:9.1f} us {e.count / steps:6.1f} x {each:8.2f} us  {e.key[:110]}")
    return "\n".join(lines)


def median_milliseconds(run: Callable[[], object], *, budget: float = 0.4, least: int = 5) -> float:
    """Median time of `run`, repeated for about `budget` seconds after three warm-up runs."""
    for _ in range(3):
        run()
    if not torch.cuda.is_available():
        return _median_on_cpu(run, budget, least)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = min(200, max(least, int(budget / max(1e-6, time.perf_counter() - begin))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def device_milliseconds(run: Callable[[], object], *, budget: float = 0.4) -> tuple[float, float]:
    """(device, host) time of `run`: replays of its captured graph, and launching it without waiting."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(5):
        run()
    host = (time.perf_counter() - begin) / 5
    return median_milliseconds(captured([run]).replay, budget=budget), 1e3 * host


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls; the first two run on a side stream before, to compile and allocate."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def extra_bytes(run: Callable[[], object], kept: int = 0) -> int:
    """Peak device memory of `run`, minus what was allocated before and the `kept` bytes of its results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before - kept


def eager_milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Time per call of `repeats` calls in a row without waiting in between: the slower of host and device."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / repeats


@cache
def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy far larger than the cache."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_milliseconds(lambda: target.copy_(source)) * 1e-3)


@cache
def matrix_rate() -> float:
    """Operations per second of an 8192^3 bfloat16 matrix product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (median_milliseconds(lambda: a @ b) * 1e-3)


def floor_milliseconds(operations: float, moved_bytes: float) -> float:
    """The time that no implementation can beat on this device."""
    return 1e3 * max(operations / matrix_rate(), moved_bytes / copy_bandwidth())


def _median_on_cpu(run: Callable[[], object], budget: float, least: int) -> float:
    times: list[float] = []
    while len(times) < least or sum(times) < budget:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)
