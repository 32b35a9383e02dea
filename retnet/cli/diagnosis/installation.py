"""Findings about the installation, from metadata: no package is imported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from retnet import __version__
from retnet.cli.diagnosis.finding import Finding, reason
from retnet.system.extras import LIBRARIES, install_command
from retnet.system.machine import core_quota, cpu_name, source_commit, usable_cores
from retnet.system.memory import available_bytes, total_bytes
from retnet.system.sizes import format_bytes

LOW_MEMORY = 2**30
BUSY = 1.5  # processes that want to run, per core
# Settings of the environment that slow everything down while they are set.
SLOW_SETTINGS = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "RETNET_DEBUG": "values are checked on the GPU, which waits for it",
    "TRITON_INTERPRET": "kernels run in an interpreter on the CPU",
    "TORCHDYNAMO_DISABLE": "torch.compile does nothing",
}
_DRIVER = Path("/proc/driver/nvidia/version")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def installation() -> Iterator[Finding]:
    """What is installed, and what of it does not fit."""
    commit = source_commit()
    place = f"{Path(__file__).parents[3]}{f', commit {commit}' if commit else ''}"
    yield Finding("retnet", "ok", f"{__version__}, in {place}")
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable}) on {platform.platform()}")
    yield _processor()
    yield from _load()
    yield _memory()
    yield _requirements()
    yield from _extras()
    yield from _settings()
    yield from _huge_pages()


def driver() -> str | None:
    """The NVIDIA driver that the kernel has loaded, None if there is none."""
    try:
        return _DRIVER.read_text(errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return None


def _processor() -> Finding:
    cores, quota = usable_cores(), core_quota()
    text = f"{cpu_name()}, {cores} cores for this process"
    if quota is None or quota >= cores:
        return Finding("processor", "ok", text)
    return Finding(
        "processor",
        "slow",
        f"{text}, but the container gets the time of {quota:g}",
        f"more threads than {quota:g} wait for each other: set OMP_NUM_THREADS={max(1, int(quota))}",
    )


def _load() -> Iterator[Finding]:
    """Whether other processes compete for the processor; nothing where the system does not tell."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return
    cores = os.cpu_count() or 1
    if load > BUSY * cores:
        text = f"{load:.1f} processes want to run on {cores} cores (mean of a minute): they wait for each other"
        advice = "end other programs, or set OMP_NUM_THREADS=1: threads that wait for each other are many times slower"
        yield Finding("load", "slow", text, f"{advice}; speeds that are measured meanwhile mean little")


def _memory() -> Finding:
    total, free = total_bytes(), available_bytes()
    if not total:
        return Finding("memory", "not run", "this system does not tell how much memory it has")
    text = format_bytes(total, 3) + ("" if free is None else f", {format_bytes(free, 3)} of it available")
    if free is not None and free < LOW_MEMORY:
        return Finding("memory", "slow", text, "end other programs, or choose a smaller model: swapping is slow")
    return Finding("memory", "ok", text)


def _requirements() -> Finding:
    """Whether the packages that the core needs are installed in versions that fit."""
    name = "core packages"
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Finding(name, "not run", "versions are compared with the package `packaging`, which is not installed")
    try:
        lines = importlib.metadata.requires("retnet") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not run", "retnet runs from a folder and is not installed: no list of requirements")
    versions, wrong = [], []
    for line in lines:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        versions.append(f"{needed.name} {version}")
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} is {version}, needed: {needed.specifier}")
    if wrong:
        return Finding(name, "problem", "; ".join(wrong), f"{install_command('')} installs what fits")
    return Finding(name, "ok", ", ".join(versions))


def _extras() -> Iterator[Finding]:
    for extra, libraries in sorted(LIBRARIES.items()):
        try:
            missing = [library for library in libraries if find_spec(library) is None]
        except (ImportError, ValueError) as error:  # a package whose metadata is broken
            yield Finding(f"extra {extra}", "problem", reason(error), install_command(extra))
            continue
        if missing:
            text = f"not installed: {', '.join(missing)}"
            yield Finding(f"extra {extra}", "note", text, install_command(extra))
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(libraries))


def _settings() -> Iterator[Finding]:
    for name, effect in SLOW_SETTINGS.items():
        if os.environ.get(name, "0") not in ("", "0"):
            yield Finding(name, "slow", f"is set to {os.environ[name]!r}: {effect}", f"unset {name}")


def _huge_pages() -> Iterator[Finding]:
    try:
        never = "[never]" in _HUGE_PAGES.read_text()
    except OSError:  # not Linux
        return
    if never:
        yield Finding(
            "huge pages",
            "slow",
            "are off: large results on the CPU fill slower",
            f"echo madvise > {_HUGE_PAGES} (as root)",
        )
