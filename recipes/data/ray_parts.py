"""`retnet data` on a Ray cluster: parts as tasks, and the merge when all of them are done.

    python recipes/data/ray_parts.py 64 SOURCE... OUT [options of `retnet data`]

The number is that of the parts; each takes one core, on whichever machine has one free. `RAY_ADDRESS` names a cluster;
without it Ray starts on this machine. Sources, OUT and the tokenizer are paths or URLs that mean the same on every
machine, and `retnet` is installed there. Ray runs the part of a machine that was lost again elsewhere, which changes no
byte. A part that refuses its input ends the run with its message; the finished parts stay, and the same command goes on.
"""

from __future__ import annotations

import subprocess
import sys
import time

import ray

CORES = 1
RETRIES = 3  # of a part whose process or machine was lost


@ray.remote(num_cpus=CORES, max_retries=RETRIES)
def write_part(number: int, count: int, words: list[str]) -> tuple[int, str]:
    """The exit code and the output of one part."""
    shard = ["--shard", f"{number}/{count}", "--workers", str(CORES)]
    command = [sys.executable, "-m", "retnet.cli", "data", "write", *words, *shard]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode < 0:  # killed by a signal: Ray tries again
        raise ChildProcessError(f"part {number}/{count} was killed by signal {-done.returncode}")
    return done.returncode, done.stdout.strip()


def out_of(words: list[str]) -> str:
    """The last word that is neither an option nor the value of one."""
    places, rest = [], iter(words)
    for word in rest:
        if not word.startswith("--"):
            places.append(word)
        elif word != "--with-end" and "=" not in word:
            next(rest, None)
    return places[-1]


def main() -> int:
    if len(sys.argv) < 4 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        sys.exit("accepted: ray_parts.py PARTS SOURCE... OUT [options of `retnet data`]")
    count, words = int(sys.argv[1]), sys.argv[2:]
    ray.init(log_to_driver=False)
    began = time.perf_counter()
    waiting = [
        write_part.options(retry_exceptions=[ChildProcessError]).remote(k, count, words) for k in range(1, count + 1)
    ]
    while waiting:
        (done, *_), waiting = ray.wait(waiting)
        code, output = ray.get(done)
        print(output, flush=True)
        if code:
            for task in waiting:
                ray.cancel(task)
            return code
    print(f"{count} parts in {time.perf_counter() - began:.1f} s", flush=True)
    return subprocess.run([sys.executable, "-m", "retnet.cli", "data", "merge", out_of(words)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
