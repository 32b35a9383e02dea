"""Development bench of the Hopper walk: check against the float64 oracle, then time every stage.

    python benchmarks/dev_walk.py check|stages

Prints one line a case. `check` compares with `reference.parallel` in float64 on the same rounded inputs, and gives the
error of `reference.parallel` in bfloat16 beside it.
"""

import sys
import time
import torch

from retnet.kernels import walk
from retnet.ops import reference

SHAPES = [
    (4, 8192, 8, 256, 512, None),
    (16, 2048, 8, 256, 512, None),
    (4, 8192, 16, 128, 128, None),
    (8, 4096, 16, 64, 128, None),
    (1, 32768, 8, 256, 512, None),
    (1, 131072, 8, 256, 512, None),
    (1, 32768, 8, 256, 512, "pack"),
]
CHECKS = [
    (2, 457, 3, 256, 512, True),
    (1, 2573, 2, 256, 512, True),
    (2, 64, 2, 256, 512, False),
    (2, 457, 3, 128, 128, True),
    (2, 2573, 2, 64, 128, True),
    (2, 300, 3, 128, 256, True),
    (1, 1, 1, 64, 128, True),
    (1, 1500, 3, 256, 128, True),
    (1, 1500, 3, 64, 64, True),
    (2, 3000, 1, 64, 512, True),
    (2, 200, 2, 128, 512, False),
    (2, 457, 3, 256, 512, "mask"),
    (1, 2573, 2, 256, 512, "mask"),
    (3, 1300, 1, 64, 128, "mask"),
    (1, 457, 3, 256, 512, "pack"),
    (1, 2573, 2, 256, 512, "pack"),
    (1, 2000, 2, 128, 128, "pack"),
]


def places(B, T, kind):
    """mask with left padding and holes, or cu_seqlens with short, empty and aligned documents."""
    if kind == "mask":
        mask = torch.ones(B, T, dtype=torch.bool, device="cuda")
        mask[0, :70] = mask[-1, T // 2 : T // 2 + 9] = mask[-1, -3:] = False
        return mask, None
    if kind == "pack":
        return None, torch.tensor([0, 5, 5, 64, 192, 300, 301, T - 1, T], device="cuda")
    return None, None


def inputs(B, T, H, K, V, with_state, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)
    q, k = (torch.nn.functional.normalize(random(B, T, H, K), dim=-1).mul(K**0.25).bfloat16() for _ in range(2))
    v, dout = (random(B, T, H, V).bfloat16() for _ in range(2))
    log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(H, device="cuda", dtype=torch.float32))))
    if H > 2:
        log_decay[-1] = -1.5
    state, dfinal = (random(B, H, K, V) if with_state else None for _ in range(2))
    return q, k, v, dout, log_decay, state, dfinal


def oracle(dtype, q, k, v, dout, log_decay, state, dfinal, scale, mask, cu):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    decay = log_decay.to(torch.float64 if dtype == torch.float64 else torch.float32)
    start = None if state is None else state.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    out, final = reference.parallel(*leaves, decay, scale=scale, state=start, mask=mask, cu_seqlens=cu)
    loss = (out * dout.to(out.dtype)).sum().double()
    if dfinal is not None:
        loss = loss + (final * dfinal.to(final.dtype)).sum().double()
    wanted = leaves + ([] if start is None else [start])
    grads = torch.autograd.grad(loss, wanted)
    return [out, final, *grads]


def error(x, ref):
    return ((x.double() - ref).norm() / ref.norm().clamp_min(1e-300)).item()


def check():
    names = ["out", "final", "dq", "dk", "dv", "dstate"]
    bad = 0
    for B, T, H, K, V, kind in CHECKS:
        q, k, v, dout, log_decay, state, dfinal = inputs(B, T, H, K, V, kind is True or kind == "mask")
        mask, cu = places(B, T, kind)
        scale = K**-0.5
        assert walk.walk_supported(q, k, v, log_decay, state, mask, cu, dfinal)
        runs = []
        for _ in range(2):
            out, final = walk.walk_forward(q, k, v, log_decay, scale, state, mask, cu, torch.float32)
            dq, dk, dv, dstate = walk.walk_backward(dout, dfinal, q, k, v, log_decay, scale, state, mask, cu)
            runs.append([out, final, dq, dk, dv] + ([] if state is None else [dstate]))
        same = all(torch.equal(a, b) for a, b in zip(*runs))
        args = (q, k, v, dout, log_decay, state, dfinal, scale, mask, cu)
        exact, plain = oracle(torch.float64, *args), oracle(torch.bfloat16, *args)
        cells = []
        for name, got, ref, low in zip(names, runs[0], exact, plain):
            ours, theirs = error(got, ref), error(low, ref)
            good = ours <= 2 * theirs
            bad += not good
            cells.append(f"{name} {ours:.1e}/{theirs:.1e}{'' if good else ' BAD'}")
        bad += not same
        parts = walk.walk_plan(B, T, H, K, V, q.device)["parts"]
        print(f"{(B, T, H, K, V)} {kind} parts {parts} same {same}: " + ", ".join(cells), flush=True)
    print("check:", "ok" if not bad else f"{bad} BAD", flush=True)


def milliseconds(call, repeats=12):
    """Median over replays of a captured graph: GPU time without launch overhead."""
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


def host_milliseconds(call, repeats=20):
    """Host time of a call that waits for nothing."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * spent / repeats


def stages():
    for B, T, H, K, V, kind in SHAPES:
        q, k, v, dout, log_decay, _, _ = inputs(B, T, H, K, V, False)
        mask, cu = None, None
        if kind == "pack":
            cu = torch.arange(0, T + 1, 1000, device="cuda")
            cu[-1] = T
        scale, out, dv = K**-0.5, torch.empty_like(v), torch.empty_like(v)
        call = walk._Call.of(q, v, log_decay, scale, mask, cu)
        sums = torch.empty(walk._tile(V, K).splits * B, T, H, K, dtype=q.dtype, device="cuda")
        forward = lambda: walk.walk_forward(q, k, v, log_decay, scale, None, mask, cu, torch.float32)
        backward = lambda: walk.walk_backward(dout, None, q, k, v, log_decay, scale, None, mask, cu)
        calls = {
            "forward": forward,
            "backward": backward,
            "out": lambda: call.walk(q, k, v, None, False, out, False),
            "states": lambda: call.walk(None, k, v, None, False, None, True),
            "dv": lambda: call.walk(k, q, dout, None, True, dv, False),
            "dq": lambda: call.walk(dout, v, k, None, False, sums, False, over_values=True),
            "dk": lambda: call.walk(v, dout, q, None, True, sums, False, over_values=True),
            "add": lambda: torch.add(sums[:B], sums[-B:]),
        }
        times = {name: milliseconds(run) for name, run in calls.items()}
        host = host_milliseconds(forward), host_milliseconds(backward)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = backward()
        extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * 2 for x in (q, k, v))
        del kept
        line = " ".join(f"{name} {ms:.3f}" for name, ms in times.items())
        total = times["forward"] + times["backward"]
        print(
            f"{(B, T, H, K, V)} {kind}: {line} | fwd+bwd {total:.3f} host {host[0]:.3f} {host[1]:.3f} extra {extra >> 20} MiB",
            flush=True,
        )


if __name__ == "__main__":
    {"check": check, "stages": stages}[sys.argv[1]]()
