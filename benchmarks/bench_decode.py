"""One decode step of retention on a GPU: a captured graph rotates over enough states that none stays in cache.

    python benchmarks/bench_decode.py --batch 1 16 128 512

The floor is the state read and written once over the copy bandwidth measured in the same run: what any step with a
state in memory must move. FLA's step is its fused recurrent kernel, which returns a new state.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from runner import Point, append, copy_bandwidth, median_milliseconds, table
from torch import Tensor

from retnet.ops.decay import paper_log_decay
from retnet.ops.retention import retention_step_

CACHE_BYTES = 1 << 29  # several times the L2 cache of any device so far


def our_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor) -> None:
    retention_step_(q, k, v, log_decay, state)


def fla_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor) -> None:
    from fla.ops.retention import fused_recurrent_retention

    fused_recurrent_retention(q, k, v, initial_state=state, output_final_state=True)


def captured(steps: list[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    """A graph of all steps, after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in steps[:2]:
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def measure(batch: int, H: int, K: int, V: int, state_dtype: torch.dtype, implementation: str) -> Point:
    size = batch * H * K * V * state_dtype.itemsize
    count = max(2, -(-CACHE_BYTES // size))
    states = [torch.randn(batch, H, K, V, device="cuda").to(state_dtype) for _ in range(count)]
    q, k, v = (torch.randn(batch, 1, H, width, device="cuda", dtype=torch.bfloat16) for width in (K, K, V))
    log_decay = paper_log_decay(H).cuda()
    run = {"ours": our_step, "fla": fla_step}[implementation]
    graph = captured([lambda s=s: run(q, k, v, s, log_decay) for s in states])
    case = f"{batch},{H},{K},{V} {str(state_dtype).removeprefix('torch.')}"
    floor = 2e3 * size / copy_bandwidth()
    return Point("decode", case, implementation, "step", median_milliseconds(graph.replay) / count, floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--heads", type=int, nargs=3, default=[16, 256, 512], metavar=("H", "K", "V"))
    parser.add_argument("--implementations", default="ours,fla")
    parser.add_argument("--csv", type=Path, default=Path("out/bench_decode.csv"))
    options = parser.parse_args()
    for implementation in options.implementations.split(","):
        if implementation == "fla" and importlib.util.find_spec("fla") is None:
            print("flash-linear-attention is not installed (pip install retnet[bench]): left out")
            continue
        for state_dtype in (torch.float32, torch.bfloat16) if implementation == "ours" else (torch.float32,):
            for batch in options.batch:
                point = measure(batch, *options.heads, state_dtype, implementation)
                print(table([point]), flush=True)
                append(options.csv, [point])
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
