"""Facts about the machine and the installation: processor, cores, versions, the commit of this package.

Everything here is read from the operating system or from metadata: no package is imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_ROOT = Path(__file__).resolve().parents[2]
_GIT_SECONDS = 10.0


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*names, platform.processor(), platform.machine()]), "unknown processor")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_quota() -> float | None:
    """Cores' worth of time that a container may use per second (cgroup v2); None without a limit."""
    try:
        quota, period = _CPU_MAX.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def source_commit() -> str:
    """The commit of the checkout that this package runs from, with + if tracked files differ from it.

    Without a checkout it is $GIT_COMMIT, or "" if that is not set either.
    """
    if (_ROOT / "pyproject.toml").is_file() and (_ROOT / ".git").exists():  # not a folder inside another repository
        commit = _git("rev-parse", "--short=12", "HEAD")
        if commit:
            return commit + ("+" if _git("status", "--porcelain", "-uno") else "")
    return os.environ.get("GIT_COMMIT", "")


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return ""
    return run.stdout.strip()
