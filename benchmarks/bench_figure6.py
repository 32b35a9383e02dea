"""The paper's Figure 6, measured again: memory, latency and throughput of decoding at the shape of the 6.7B model.

    python benchmarks/bench_figure6.py --lengths 512 2048 8192 32768 --batch 8 --budget 64
    python benchmarks/bench_figure6.py --memory                  memory alone, without a GPU
    python benchmarks/bench_figure6.py --plot PNG                a plot of the CSV file's rows

The paper compares with a Transformer whose cache grows by concatenation. Here the Transformer has a static cache, one
CUDA graph per token, the same fused products, and attention over exactly the cached tokens. It has as many heads of
keys and values as of queries (MHA), or 8 (GQA). Weights are random, bfloat16; RetNet's states are float32. Points:

    memory      bytes per sequence, weights not counted: the shapes determine them
    latency     time per step at batch size --batch, as the host waits for it
    throughput  tokens/s with as many sequences as fit in --budget GiB beside the weights (at most --most)

The crossover of a quantity is the context length from which RetNet is ahead; below it, RetNet loses.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import runner
import torch
from plots import BYTES, LENGTHS, last_number, lines, save_panels
from rivals import LLAMAS, TransformerStep
from runner import Point, arguments, median_milliseconds, need_gpu, read, report

from retnet.models.decode.sampling import Sampling
from retnet.models.lm import LanguageModel
from retnet.models.presets import preset
from retnet.plots.panels import Panel, Scale
from retnet.serve.engine import Engine
from retnet.serve.pool import SlotPool
from retnet.serve.request import Request

GQA_HEADS = 8
RING = 32
STEPS = 2 * RING  # a multiple of the ring, so that the steps that write it are included


def affordable(budget: float, one: int, most: int) -> int:
    """Number of sequences of `one` bytes that fit in `budget` GiB: a multiple of 4, or fewer than 4."""
    count = min(most, int(budget * 2**30 / one))
    return count if count < 4 else count // 4 * 4


def point(case: str, name: str, what: str, milliseconds: float, bytes_per_sequence: int, batch: int) -> Point:
    note = f"batch {batch}, {1e3 * batch / milliseconds:.0f} tokens/s"
    return Point("figure6", case, name, what, milliseconds, extra_bytes=bytes_per_sequence, note=note)


def memory_by_shape(options: argparse.Namespace) -> Iterator[Point]:
    """The bytes of a sequence at every length; `milliseconds` is nan, since nothing is timed."""
    with torch.device("meta"):
        model = LanguageModel(replace(preset(options.model), dtype="bfloat16")).eval()
    state, deferred = (SlotPool(model, num_slots=1, deferred_writes=ring).cost.state for ring in (0, RING))
    layers, width, heads, _ = LLAMAS[options.model]
    per_token = 2 * layers * (width // heads) * torch.bfloat16.itemsize  # a key and a value of one head in every layer
    for length in options.lengths:
        for name, one in (
            ("RetNet", state),
            (f"RetNet, writes deferred by {RING}", deferred),
            ("Transformer, MHA", heads * per_token * length),
            (f"Transformer, GQA {GQA_HEADS}", GQA_HEADS * per_token * length),
        ):
            yield Point(
                "figure6", f"length {length}", name, "memory", math.nan, extra_bytes=one, note="from the shapes"
            )


def retnet_step(model: LanguageModel, batch: int, ring: int) -> tuple[float, int]:
    """(milliseconds per step, bytes per sequence); both are independent of the context length."""
    engine = Engine(model, num_slots=batch, deferred_writes=ring)
    for slot in range(batch):
        engine.submit(Request([slot], None, Sampling(temperature=0), ignore_eos=True))
    while engine.stats().waiting or engine.stats().running < batch:
        engine.step()
    for _ in range(RING):
        engine.step()
    taken = median_milliseconds(lambda: [engine.step() for _ in range(STEPS)], budget=0.5, least=1) / STEPS
    return taken, engine.pool.cost.state


def by_retnet(options: argparse.Namespace) -> Iterator[Point]:
    """Measured once and reported at every length, since nothing depends on it."""
    with torch.device("cuda"):
        model = LanguageModel(replace(preset(options.model), dtype="bfloat16")).eval()
    for name, ring in (("RetNet", 0), (f"RetNet, writes deferred by {RING}", RING)):
        _, one = retnet_step(model, 1, ring)
        for what, batch in (("latency", options.batch), ("throughput", affordable(options.budget, one, options.most))):
            taken, one = retnet_step(model, batch, ring)
            torch.cuda.empty_cache()
            for length in options.lengths:
                yield point(f"length {length}", name, what, taken, one, batch)
    del model
    torch.cuda.empty_cache()


@torch.no_grad()
def by_transformer(options: argparse.Namespace) -> Iterator[Point]:
    heads = LLAMAS[options.model][2]
    for name, kv_heads in (("Transformer, MHA", heads), (f"Transformer, GQA {GQA_HEADS}", GQA_HEADS)):
        weights = None
        for length in options.lengths:
            step = TransformerStep(options.model, kv_heads, 1, length, weights)
            weights, one = step.weights, step.cache.nbytes
            del step
            for what, batch in (
                ("latency", options.batch),
                ("throughput", affordable(options.budget, one, options.most)),
            ):
                if batch < 1 or batch * one > options.budget * 2**30:
                    print(f"{name}, length {length}, {what}: batch {max(1, batch)} does not fit in the budget")
                    continue
                step = TransformerStep(options.model, kv_heads, batch, length, weights)
                taken, _ = runner.device_milliseconds(step.run)
                yield point(f"length {length}", name, what, taken, one, batch)
                del step
                torch.cuda.empty_cache()


def crossovers(points: list[Point]) -> Iterator[str]:
    """For each rival and quantity, the shortest measured length at which RetNet is ahead."""
    lengths = sorted({int(p.case.split()[-1]) for p in points})
    ours = [p for p in points if p.implementation == "RetNet"]
    for rival in dict.fromkeys(p.implementation for p in points if p.implementation.startswith("Transformer")):
        theirs = [p for p in points if p.implementation == rival]
        at = {(p.what, p.case): p for p in theirs}
        for label, what, larger in (
            ("memory per sequence", "latency", lambda a, b: a.extra_bytes > b.extra_bytes),
            ("latency", "latency", lambda a, b: a.milliseconds > b.milliseconds),
            ("throughput", "throughput", lambda a, b: tokens_per_second(a) < tokens_per_second(b)),
        ):
            pairs = [(int(p.case.split()[-1]), at.get((what, p.case)), p) for p in ours if p.what == what]
            ahead = [length for length, theirs_at, mine in pairs if theirs_at is not None and larger(theirs_at, mine)]
            where = f"from {min(ahead)} tokens" if ahead else f"at no length up to {lengths[-1]} tokens"
            yield f"{label}: RetNet is ahead of {rival} {where}"


def tokens_per_second(p: Point) -> float:
    return float(p.note.split(", ")[1].split()[0])


def main() -> None:
    parser = arguments(__doc__, csv="out/bench_figure6.csv")
    parser.add_argument("--model", default="retnet-6.7b", choices=sorted(LLAMAS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--batch", type=int, default=8, help="sequences per step, for latency")
    parser.add_argument("--budget", type=float, default=64.0, help="GiB for states or caches, for throughput")
    parser.add_argument("--most", type=int, default=256, help="largest batch, for throughput")
    parser.add_argument("--memory", action="store_true", help="memory alone, which needs no GPU")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="only plot the rows of the CSV file")
    options = parser.parse_args()
    if options.plot is not None:
        plot(read(options.csv), options)
        return
    report(memory_by_shape(options), options.csv)
    if options.memory:
        return
    need_gpu()
    points = [point for measured in (by_retnet, by_transformer) for point in report(measured(options), options.csv)]
    for line in crossovers(points):
        print(line)


def plot(points: list[Point], options: argparse.Namespace) -> None:
    def panel(title: str, y: Scale, what: str, value: Callable[[Point], float | None]) -> Panel:
        return Panel(title, LENGTHS, y, lines([p for p in points if p.what == what], last_number, value))

    fits = f"Sequences in {options.budget:g} GiB"
    panels = [
        panel("Memory per sequence", BYTES, "memory", lambda p: p.extra_bytes),
        panel(
            f"Time, batch {options.batch}", Scale("ms per step", limits=(0, None)), "latency", lambda p: p.milliseconds
        ),
        panel(fits, Scale("tokens per second", log=10), "throughput", tokens_per_second),
    ]
    timed = [p for p in points if p.what != "memory"]
    words = ("weights and caches in bfloat16, states in float32", "memory as the shapes determine it, on every device")
    save_panels(options.plot, panels, f"Decoding at the shape of {options.model}", timed, *words)


if __name__ == "__main__":
    main()
