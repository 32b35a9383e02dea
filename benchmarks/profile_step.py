"""Profile of one decode step: time per kernel on a GPU, per operator on a CPU, and the whole step without a profiler.

python benchmarks/profile_step.py --model retnet-1.3b --dtype bfloat16 --batch 1
"""

import argparse
import time

import torch
from runner import profile_table

from retnet.models.decode.sampling import Sampling
from retnet.models.lm import LanguageModel
from retnet.models.presets import preset
from retnet.serve.engine import Engine
from retnet.serve.request import Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="retnet-125m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--deferred", type=int, default=0, help="deferred writes, as for the engine")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=14, help="kernels or operators to print")
    options = parser.parse_args()
    with torch.device(options.device):
        model = LanguageModel(preset(options.model)).to(getattr(torch, options.dtype)).eval()
    engine = Engine(model, num_slots=options.batch, deferred_writes=options.deferred)
    sampling = Sampling(temperature=options.temperature, seed=0)
    for slot in range(options.batch):
        engine.submit(Request([slot, 1], None, sampling, ignore_eos=True))
    for _ in range(3 + options.batch):
        engine.step()
    begin = time.perf_counter()
    for _ in range(options.steps):
        engine.step()
    wall = 1e3 * (time.perf_counter() - begin) / options.steps
    print(f"{wall:.3f} ms per step without the profiler")
    print(profile_table(engine.step, options.steps, options.rows, torch.device(options.device)))


if __name__ == "__main__":
    main()
