"""Speed of one recurrent step of retention on a GPU. A captured graph rotates over more states than fit in cache.

    python benchmarks/bench_decode.py --batch 1 16 128 512
    python benchmarks/bench_decode.py --variants          tiles of the step, for retnet/kernels/retention/tiles.py

The floor is the time to read and write the state once at the copy bandwidth of the same run. "deferred" is the
engine's step with deferred writes: it reads the state and a half-full ring of 32 waiting rows, and writes the ring
into the state every 32nd step. Its time is the mean over such a cycle, against the same floor. FLA's step is its fused
recurrent kernel, which returns a new state.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from runner import Point, arguments, captured, copy_bandwidth, fla_installed, median_milliseconds, need_gpu, report
from torch import Tensor

from retnet.ops.decay import paper_log_decay
from retnet.ops.decode.ring import Ring
from retnet.ops.decode.step import decode_step_
from retnet.ops.recurrence import StepDecay
from retnet.ops.retention import retention_step_

RING = 32
CACHE_BYTES = 1 << 29  # several times the L2 cache of any device so far


def our_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor) -> None:
    retention_step_(q, k, v, log_decay, state)


def deferred_step(ring: Ring, q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor) -> None:
    everyone = torch.ones(len(q), dtype=torch.bool, device="cuda")
    decode_step_(q[:, 0], k[:, 0], v[:, 0], None, "none", StepDecay(log_decay), state, everyone, ring=ring)


def ring_of(batch: int, H: int, K: int, V: int, waiting: int) -> Ring:
    k, v = (torch.randn(batch, H, RING, width, device="cuda", dtype=torch.bfloat16) for width in (K, V))
    logs = paper_log_decay(H).cuda()[:, None].expand(batch, H, RING).contiguous()
    return Ring(k, v, logs, torch.full((batch,), waiting, device="cuda"))


def tiled_step(tile, q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor) -> None:
    from retnet.kernels.decode.recurrent import retention_step
    from retnet.kernels.retention.problem import RetentionProblem

    retention_step(RetentionProblem(q, k, v, log_decay, q.shape[-1] ** -0.5), state, tile)


def fla_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor) -> None:
    from fla.ops.retention import fused_recurrent_retention

    fused_recurrent_retention(q, k, v, initial_state=state, output_final_state=True)


Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def step_milliseconds(batch: int, H: int, K: int, V: int, state_dtype: torch.dtype, run: Step) -> float:
    size = batch * H * K * V * state_dtype.itemsize
    count = max(2, -(-CACHE_BYTES // size))
    states = [torch.randn(batch, H, K, V, device="cuda").to(state_dtype) for _ in range(count)]
    q, k, v = (torch.randn(batch, 1, H, width, device="cuda", dtype=torch.bfloat16) for width in (K, K, V))
    log_decay = paper_log_decay(H).cuda()
    graph = captured([partial(run, q, k, v, state, log_decay) for state in states])
    return median_milliseconds(graph.replay) / count


def measure(batch: int, H: int, K: int, V: int, state_dtype: torch.dtype, implementation: str) -> Point:
    clock = partial(step_milliseconds, batch, H, K, V, state_dtype)
    note = ""
    if implementation == "deferred":
        step = clock(partial(deferred_step, ring_of(batch, H, K, V, RING // 2)))
        fold = clock(partial(deferred_step, ring_of(batch, H, K, V, RING - 1)))
        milliseconds = step + (fold - step) / RING
        note = f"step {1e3 * step:.1f} us, step that writes the ring {1e3 * fold:.1f} us"
    else:
        milliseconds = clock({"ours": our_step, "fla": fla_step}[implementation])
    return point(batch, H, K, V, state_dtype, implementation, milliseconds, note)


def point(
    batch: int, H: int, K: int, V: int, dtype: torch.dtype, name: str, milliseconds: float, note: str = ""
) -> Point:
    case = f"{batch},{H},{K},{V} {str(dtype).removeprefix('torch.')}"
    floor = 2e3 * batch * H * K * V * dtype.itemsize / copy_bandwidth()
    return Point("decode", case, name, "step", milliseconds, floor, note=note)


def measure_variants(batch: int, H: int, K: int, V: int, state_dtype: torch.dtype) -> list[Point]:
    """Every tile of the step that compiles, the fastest first."""
    from triton.runtime.errors import OutOfResources

    from retnet.kernels.retention.tiles import StepTile

    points = []
    for BV, slab, warps in itertools.product((32, 64, 128, 256), (32, 64, 128, 256), (4, 8)):
        cells = BV * slab // (32 * warps)  # cells of a slab per thread
        if BV > V or slab > K or not 16 <= cells <= (64 if slab < K else 128):
            continue
        tile = StepTile(BV, slab, warps)
        try:
            milliseconds = step_milliseconds(batch, H, K, V, state_dtype, partial(tiled_step, tile))
        except OutOfResources:
            continue
        points.append(point(batch, H, K, V, state_dtype, "ours", milliseconds, str(tile)))
    return sorted(points, key=lambda p: p.milliseconds)


def main() -> None:
    parser = arguments(__doc__, csv="out/bench_decode.csv")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--heads", type=int, nargs=3, default=[16, 256, 512], metavar=("H", "K", "V"))
    parser.add_argument("--implementations", default="ours,deferred,fla")
    parser.add_argument("--variants", action="store_true", help="measure every tile of our step")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes of our state")
    options = parser.parse_args()
    need_gpu()
    dtypes = [getattr(torch, name) for name in options.dtypes]
    if options.variants:
        for state_dtype, batch in itertools.product(dtypes, options.batch):
            report(measure_variants(batch, *options.heads, state_dtype), options.csv)
            torch.cuda.empty_cache()
        return
    for implementation in options.implementations.split(","):
        if implementation == "fla" and not fla_installed():
            continue
        for state_dtype in (torch.float32,) if implementation == "fla" else dtypes:
            for batch in options.batch:
                if implementation == "deferred" and state_dtype != torch.float32:
                    continue
                report([measure(batch, *options.heads, state_dtype, implementation)], options.csv)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
