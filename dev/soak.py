"""A soak of the server: random clients, good and bad, whose every answer is compared with what an engine gives alone.

    python dev/soak.py [--minutes 20] [--stack retention|hybrid] [--seed 0]

Half of the time with each stack unless one is named. The server runs in this process and the clients in another. It
fails for a wrong answer, and where memory, slots, files, tasks or threads are left after the clients have gone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.serve.http.soak import soak


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--stack", choices=("retention", "hybrid"), default=None, help="half of the time each if None")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stacks = ("retention", "hybrid") if options.stack is None else (options.stack,)
    for stack in stacks:
        say(f"{stack}, {options.minutes / len(stacks):g} minutes, seed {options.seed}")
        soak(60 * options.minutes / len(stacks), stack, options.seed, say)


if __name__ == "__main__":
    main()
