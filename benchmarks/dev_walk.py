"""Development bench of the Hopper walk: the time of every stage.

    python benchmarks/dev_walk.py stages     a line a shape: GPU time of every walk, host time, memory
    python benchmarks/dev_walk.py once       one forward walk at (256, 512), for a profiler to look at

GPU times are medians over replays of a captured graph, without launch overhead. Correctness is
tests/kernels/retention/hopper/test_walk.py.
"""

import sys
import time
from collections.abc import Callable

import torch

from retnet.kernels.retention.hopper import passes as walk
from retnet.kernels.retention.problem import RetentionProblem

SHAPES = [
    (4, 8192, 8, 256, 512, ""),
    (16, 2048, 8, 256, 512, ""),
    (2, 8192, 8, 256, 512, ""),
    (4, 8192, 16, 128, 128, ""),
    (8, 4096, 16, 64, 128, ""),
    (1, 32768, 8, 256, 512, ""),
    (1, 131072, 8, 256, 512, ""),
    (1, 32768, 8, 256, 512, "packed"),
]


def milliseconds(call: Callable[[], object], repeats: int = 12) -> float:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def host_milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * spent / repeats


def extra_bytes(call: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Peak memory of a call beyond what it returns."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.untyped_storage().nbytes() for x in results)


def make(B: int, T: int, H: int, K: int, V: int, kind: str):
    """Random q, k, v, dout, log_decay of the paper's schedule, and documents of 1000 tokens for "packed"."""
    q, k = (torch.randn(B, T, H, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v, dout = (torch.randn(B, T, H, V, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(H, device="cuda", dtype=torch.float32))))
    cu = None
    if kind == "packed":
        cu = torch.arange(0, T + 1, 1000, device="cuda")
        cu[-1] = T
    return q, k, v, dout, log_decay, cu


def stages(B: int, T: int, H: int, K: int, V: int, kind: str) -> None:
    q, k, v, dout, log_decay, cu = make(B, T, H, K, V, kind)
    scale, out, dv = K**-0.5, torch.empty_like(v), torch.empty_like(v)
    problem = RetentionProblem(q, k, v, log_decay, scale, cu_seqlens=cu)
    call, zeros = walk._Call.of(problem), walk._Starts(None, None)

    def forward():
        return walk.walk_forward(problem, None)[:1]

    def backward():
        grads = walk.walk_backward(problem, dout, None, need_dstate=False)
        return grads.dq, grads.dk, grads.dv

    calls = {
        "forward": forward,
        "backward": backward,
        "out": lambda: call.walk(q, k, v, zeros, False, out, False),
        "states": lambda: call.walk(None, k, v, zeros, False, None, True),
        "dv": lambda: call.walk(k, q, dout, zeros, True, dv, False),
        "dq": lambda: call.walk_over_values(dout, v, k, zeros, False),
        "dk": lambda: call.walk_over_values(v, dout, q, zeros, True),
    }
    times = {name: milliseconds(run) for name, run in calls.items()}
    line = " ".join(f"{name} {ms:.3f}" for name, ms in times.items())
    host = f"{host_milliseconds(forward):.3f} {host_milliseconds(backward):.3f}"
    extra = f"{extra_bytes(forward) >> 20} {extra_bytes(backward) >> 20}"
    total = times["forward"] + times["backward"]
    print(f"{(B, T, H, K, V)} {kind}: fwd+bwd {total:.3f} | {line} | host {host} | extra MiB {extra}", flush=True)


def once() -> None:
    q, k, v, _, log_decay, _ = make(*SHAPES[0])
    walk.walk_forward(RetentionProblem(q, k, v, log_decay, 1 / 16), None)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:] == ["once"]:
        once()
    elif sys.argv[1:] == ["stages"]:
        for shape in SHAPES:
            stages(*shape)
    else:
        sys.exit(__doc__)
