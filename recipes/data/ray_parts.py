"""`retnet data` on a Ray cluster: parts as tasks, and the merge when all of them are done.

    python recipes/data/ray_parts.py 64 SOURCE... OUT -- [options of `retnet data`]

The number is that of the parts; each takes one core, on whichever machine has one free. `RAY_ADDRESS` names a cluster;
without it Ray starts on this machine. Sources and OUT are paths or URLs that mean the same on every machine, which has
the tokenizer and `retnet`, too. Ray runs a part again whose machine or process was lost. A part that refuses
its input ends the run with its message; the finished parts stay, and the same command goes on.
"""

from __future__ import annotations

import subprocess
import sys
import time

import ray

CORES = 1
RETRIES = 3  # of a part whose process or machine was lost
RETNET = [sys.executable, "-m", "retnet.cli", "data"]


@ray.remote(num_cpus=CORES, max_retries=RETRIES, retry_exceptions=[ChildProcessError])
def write_part(number: int, count: int, places: list[str], options: list[str]) -> tuple[int, str]:
    """The exit code and the output of one part."""
    shard = ["--shard", f"{number}/{count}", "--workers", str(CORES)]
    command = [*RETNET, "write", *places, *options, *shard]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode < 0:
        raise ChildProcessError(f"part {number}/{count} was ended by signal {-done.returncode}")
    return done.returncode, done.stdout.strip()


def main(words: list[str]) -> int:
    count, *places = words[: words.index("--")] if "--" in words else words
    options = words[len(places) + 2 :]
    if not count.isdecimal() or int(count) < 1 or len(places) < 2:
        sys.exit("accepted: ray_parts.py PARTS SOURCE... OUT -- [options of `retnet data`]")
    ray.init(log_to_driver=False)
    began = time.perf_counter()
    waiting = [write_part.remote(number, int(count), places, options) for number in range(1, int(count) + 1)]
    while waiting:
        (done, *_), waiting = ray.wait(waiting)
        code, output = ray.get(done)
        print(output, flush=True)
        if code:
            for task in waiting:
                ray.cancel(task)
            return code
    print(f"{count} parts in {time.perf_counter() - began:.1f} s", flush=True)
    return subprocess.run([*RETNET, "merge", places[-1]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [""]))
