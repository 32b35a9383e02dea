"""Development bench of the Hopper walk: check against the float64 oracle, then time every stage and tile.

    python benchmarks/dev_walk.py check|stages|tiles

Prints one line a case. `check` compares with `reference.parallel` in float64 on the same rounded inputs, and gives the
error of `reference.parallel` in bfloat16 beside it.
"""

import sys
from dataclasses import replace

import torch

from retnet.kernels import walk
from retnet.ops import reference

SHAPES = [(4, 8192, 8, 256, 512), (4, 8192, 16, 128, 128), (8, 4096, 16, 64, 128), (1, 32768, 8, 256, 512)]
CHECKS = [
    (2, 457, 3, 256, 512, True),
    (1, 2573, 2, 256, 512, True),
    (2, 64, 2, 256, 512, False),
    (2, 457, 3, 128, 128, True),
    (2, 2573, 2, 64, 128, True),
    (2, 300, 3, 128, 256, True),
    (1, 1, 1, 64, 128, True),
]


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


def oracle(dtype, q, k, v, dout, log_decay, state, dfinal, scale):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    decay = log_decay.detach().double().requires_grad_() if dtype == torch.float64 else log_decay.detach().clone().requires_grad_()
    start = None if state is None else state.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    out, final = reference.parallel(*leaves, decay, scale=scale, state=start)
    loss = (out * dout.to(out.dtype)).sum().double()
    if dfinal is not None:
        loss = loss + (final * dfinal.to(final.dtype)).sum().double()
    wanted = leaves + [decay] + ([] if start is None else [start])
    grads = torch.autograd.grad(loss, wanted)
    return [out, final, *grads]


def error(x, ref):
    return ((x.double() - ref).norm() / ref.norm().clamp_min(1e-300)).item()


def check():
    names = ["out", "final", "dq", "dk", "dv", "dlog", "dstate"]
    bad = 0
    for B, T, H, K, V, with_state in CHECKS:
        q, k, v, dout, log_decay, state, dfinal = inputs(B, T, H, K, V, with_state)
        scale = K**-0.5
        assert walk.walk_supported(q, k, v, log_decay, state, None, None)
        runs = []
        for _ in range(2):
            out, final = walk.walk_forward(q, k, v, log_decay, scale, state, torch.float32)
            dq, dk, dv, dlog, dstate = walk.walk_backward(dout, dfinal, q, k, v, log_decay, scale, state, True)
            runs.append([out, final, dq, dk, dv, dlog] + ([] if state is None else [dstate]))
        same = all(torch.equal(a, b) for a, b in zip(*runs))
        args = (q, k, v, dout, log_decay, state, dfinal, scale)
        exact, plain = oracle(torch.float64, *args), oracle(torch.bfloat16, *args)
        cells = []
        for name, got, ref, low in zip(names, runs[0], exact, plain):
            ours, theirs = error(got, ref), error(low, ref)
            good = ours <= 2 * theirs
            bad += not good
            cells.append(f"{name} {ours:.1e}/{theirs:.1e}{'' if good else ' BAD'}")
        bad += not same
        parts = walk.walk_plan(B, T, H, K, V, q.device)["parts"]
        print(f"{(B, T, H, K, V)} parts {parts} same {same}: " + ", ".join(cells), flush=True)
    print("check:", "ok" if not bad else f"{bad} BAD", flush=True)


def milliseconds(call, repeats=12):
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def stages(shapes=SHAPES):
    for B, T, H, K, V in shapes:
        q, k, v, dout, log_decay, _, _ = inputs(B, T, H, K, V, False)
        scale, out, dq, dv = K**-0.5, torch.empty_like(v), torch.empty_like(q), torch.empty_like(v)
        saved = walk._saved_like(q, v)
        calls = {
            "forward": lambda: walk.walk_forward(q, k, v, log_decay, scale, None, torch.float32),
            "backward": lambda: walk.walk_backward(dout, None, q, k, v, log_decay, scale, None, False),
            "walk": lambda: walk._walk(q, k, v, log_decay, scale, None, False, out=out),
            "states": lambda: walk._walk(None, k, v, log_decay, scale, None, False, store_final=True),
            "save": lambda: walk._walk(None, k, v, log_decay, scale, None, False, saved=saved),
            "mirror": lambda: walk._walk(k, q, dout, log_decay, scale, None, True, out=dv, saved=saved),
            "dq": lambda: walk._segments(dout, v, k, saved, log_decay, scale, dq, False),
            "dk": lambda: walk._segments(v, dout, q, saved, log_decay, scale, dq, True),
        }
        times = {name: milliseconds(call) for name, call in calls.items()}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = walk.walk_backward(dout, None, q, k, v, log_decay, scale, None, False)
        extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * 2 for x in (q, k, v))
        del kept
        line = " ".join(f"{name} {ms:.3f}" for name, ms in times.items())
        print(f"{(B, T, H, K, V)}: {line} | fwd+bwd {times['forward'] + times['backward']:.3f} extra {extra >> 20} MiB", flush=True)


def tiles():
    B, T, H, K, V = SHAPES[0]
    q, k, v, dout, log_decay, _, _ = inputs(B, T, H, K, V, False)
    scale, out, dq = K**-0.5, torch.empty_like(v), torch.empty_like(q)
    saved = walk._saved_like(q, v)
    base = walk.WALK_TILES[K, V]
    for change in [dict(y_stages=2), dict(p_stages=1), dict(y_stages=2, p_stages=1), dict(z_stages=1)]:
        walk.WALK_TILES[K, V] = replace(base, **change)
        ms = milliseconds(lambda: walk._walk(q, k, v, log_decay, scale, None, False, out=out))
        print(f"walk {change}: {ms:.3f}", flush=True)
    walk.WALK_TILES[K, V] = base
    for tile in [(128, 32, 8, 3), (128, 32, 8, 5), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 4)]:
        walk.SEGMENT_TILES[K, V] = walk.SegmentTile(*tile)
        ms = milliseconds(lambda: walk._segments(dout, v, k, saved, log_decay, scale, dq, False))
        print(f"dq {tile}: {ms:.3f}", flush=True)


if __name__ == "__main__":
    {"check": check, "stages": stages, "tiles": tiles}[sys.argv[1]]()
