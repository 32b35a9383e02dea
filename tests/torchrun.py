"""Programs in several processes: torchrun, with gloo and one thread per process."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.paths import ROOT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]  # it finds a free port


def torchrun(processes: int, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, with its arguments; variables are added to the environment."""
    command = [sys.executable, *TORCHRUN, f"--nproc_per_node={processes}", *map(str, words)]
    places = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def on_processes(processes: int, script: str, *words: object) -> str:
    """The last line that a script prints. It must succeed."""
    done = torchrun(processes, script, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]
