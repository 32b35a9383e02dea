"""Memory of this process, in bytes, without a dependency."""

import os
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size so far. The kernel reports KiB on Linux and bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident size now on Linux; elsewhere its peak, which is all that the standard library can read."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()
