"""One model on several processes: each holds its heads, and all generate the same text.

    torchrun --nproc_per_node=2 examples/split_model.py examples/hybrid.yml
    python examples/split_model.py examples/hybrid.yml             one process, the same tokens

MODEL is a preset (random weights), a stack file or a directory whose heads divide by the number of processes.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import retnet
from retnet.models.parallel.plan import tensor_parallel_
from retnet.serve.engine import Engine
from retnet.serve.request import Request


def main(name: str, count: int) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (dist.get_world_size(),))  # on a GPU, each process takes its own
    model = tensor_parallel_(retnet.load(name, kind), mesh).eval()
    engine = Engine(model, num_slots=1, max_tokens=256)
    prompt = list(range(1, 20))
    for sampling in (retnet.Sampling(temperature=0), retnet.Sampling(temperature=0.8, seed=1)):
        generation = engine.submit(Request(prompt, count, sampling, ignore_eos=True))  # the same in every process
        engine.run()
        if dist.get_rank() == 0:
            weights = sum(p.numel() for p in model.parameters())
            print(f"{weights:,} weights per process: {generation.tokens}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
    main(options.model, options.tokens)
    dist.destroy_process_group()
