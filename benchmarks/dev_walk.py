"""Development benchmark of the Hopper kernels: the time of every stage of a forward and a backward.

    python benchmarks/dev_walk.py stages     one line per shape: GPU time of every stage, host time, extra memory
    python benchmarks/dev_walk.py once       one forward at (256, 512), for a profiler

GPU times are medians over replays of a captured graph, without launch overhead. The tests of correctness are in
tests/kernels/retention/hopper/.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from runner import device_milliseconds, extra_bytes

from retnet.kernels.retention.hopper import passes
from retnet.kernels.retention.problem import RetentionProblem
from retnet.system.sizes import format_bytes

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


def make(B: int, T: int, H: int, K: int, V: int, kind: str):
    """Random q, k, v and dout, log_decay of the paper's schedule, and documents of 1000 tokens if packed."""
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
    call, zeros = passes.WalkCall.of(problem), passes.PartStarts(None, None)

    def forward():
        return passes.walk_forward(problem, None)[:1]

    def backward():
        grads = passes.walk_backward(problem, dout, None, need_dstate=False)
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
    times, host = {}, {}
    for name, run in calls.items():
        times[name], host[name] = device_milliseconds(run, budget=0.01)
    line = " ".join(f"{name} {ms:.3f}" for name, ms in times.items())
    extra = [format_bytes(_extra(run)) for run in (forward, backward)]
    total = times["forward"] + times["backward"]
    print(
        f"{(B, T, H, K, V)} {kind}: forward + backward {total:.3f} ms | {line}"
        f" | host {host['forward']:.3f} {host['backward']:.3f} | extra memory {', '.join(extra)}",
        flush=True,
    )


def _extra(run: Callable[[], Sequence[torch.Tensor]]) -> int:
    """Peak memory of a call beyond its results."""
    return extra_bytes(run, kept=sum(x.untyped_storage().nbytes() for x in run()))


def once() -> None:
    q, k, v, _, log_decay, _ = make(*SHAPES[0])
    passes.walk_forward(RetentionProblem(q, k, v, log_decay, 1 / 16), None)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:] == ["once"]:
        once()
    elif sys.argv[1:] == ["stages"]:
        for shape in SHAPES:
            stages(*shape)
    else:
        sys.exit(__doc__)
