"""Generation by the engine: time a token against position and batch, time to the first token, prefix hits, memory.

    python benchmarks/bench_generate.py --model retnet-125m --sections batch,first --threads 2
    python benchmarks/bench_generate.py --model retnet-1.3b --dtype bfloat16

Weights are random: a preset's shapes are what is measured. A time a token is the host's, Python and the copy of tokens
included, as a user waits for it: the median over groups of 32 steps, so that late writes count. The floor is the
weights read once and the states read and written once (with deferred writes: read, the rows beside them aside), over
the copy bandwidth of the same run. A position is reached by reading as many prompt tokens in blocks. Rivals, where
installed: transformers' Llama with its growing and its static cache (the latter compiled), FLA's RetNet.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import runner
import torch
from plots import Panel, lines, save_panels
from rivals import fla_retnet, generation_milliseconds, held_mebibytes, llama, prompt_milliseconds
from runner import Point, append, read, table

from retnet.models.decode.int8 import quantize_int8_
from retnet.models.decode.sampling import Sampling
from retnet.models.lm import LanguageModel
from retnet.models.presets import preset
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from retnet.serve.snapshot import Snapshot

WARM_UP_STEPS = 5
RING = 32  # rows of deferred writes
CPU_COPY_BYTES = 1 << 28  # several times the caches of any CPU so far
PROMPT_BLOCK = {"cpu": 256, "cuda": 8192}
SECTIONS = ("position", "batch", "first", "prefix", "restore", "llama", "static", "fla")


class Bench:
    """One model on one device, and what all sections share."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        with self.device:
            self.model = LanguageModel(preset(options.model)).to(self.dtype).eval()
        if options.int8:
            quantize_int8_(self.model)
        self.bandwidth = self._copy_bandwidth()

    def _copy_bandwidth(self) -> float:
        if self.device.type == "cuda":
            return runner.copy_bandwidth()
        source = torch.ones(CPU_COPY_BYTES, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * CPU_COPY_BYTES / min(seconds(lambda: target.copy_(source)) for _ in range(8))

    def engine(self, slots: int = 1, **options) -> Engine:
        block = PROMPT_BLOCK[self.device.type]
        engine = Engine(self.model, num_slots=slots, prompt_block=block, prompt_budget=64 * block, **options)
        engine.warmup()
        return engine

    def floor(self, engine: Engine, deferred: bool = False) -> float:
        """Milliseconds of a step (of a tied embedding the head's reading alone)."""
        state = engine.pool.state.nbytes * (1 + 1 / RING if deferred else 2)
        return 1e3 * (weight_bytes(self.model) + state) / self.bandwidth

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.model.config.vocab_size, (length,), generator=generator).tolist()

    def start(self, engine: Engine, count: int, length: int, temperature: float = 0.0) -> float:
        """Let `count` endless requests run after prompts of `length`; seconds to the first one's first token."""
        sampling = Sampling(temperature=temperature, seed=0)
        requests = [Request(self.prompt(length, n), None, sampling, ignore_eos=True) for n in range(count)]
        begin = time.perf_counter()
        generations = [engine.submit(request) for request in requests]
        while not generations[0].tokens:
            engine.step()
        first = time.perf_counter() - begin
        while not all(generation.num_new for generation in generations):
            engine.step()
        for _ in range(WARM_UP_STEPS):
            engine.step()
        return first

    def step_milliseconds(self, engine: Engine, most: int = 100_000) -> tuple[float, int]:
        """(median over groups of steps, steps): as many as fit into --seconds, in groups of a ring.

        On a CPU, whose memory others use too, the copy bandwidth is measured again beside.
        """
        if self.device.type == "cpu":
            self.bandwidth = self._copy_bandwidth()
        one = seconds(lambda: [engine.step() for _ in range(RING)]) / RING
        count = max(RING, min(most, int(self.options.seconds / one)) // RING * RING)
        groups = [seconds(lambda: [engine.step() for _ in range(RING)]) / RING for _ in range(count // RING)]
        return 1e3 * statistics.median(groups), count

    def note(self, batch: int, milliseconds: float, steps: int) -> str:
        return f"{1e3 * batch / milliseconds:.1f} tokens/s, {steps} steps; copies at {self.bandwidth / 1e9:.0f} GB/s"


def by_position(bench: Bench) -> Iterator[Point]:
    """One sequence, from a short context to a long one: the same time, the same memory to the byte."""
    for position in bench.options.positions:
        engine = bench.engine()
        bench.start(engine, 1, position)
        before = allocated(bench.device)
        milliseconds, steps = bench.step_milliseconds(engine)
        grown = allocated(bench.device) - before
        note = f"{grown} bytes more after them; slot {engine.pool.cost.total} bytes; " + bench.note(
            1, milliseconds, steps
        )
        held = (before or engine.pool.cost.total) / 2**20  # of the device, or on a CPU of the slot
        floor = bench.floor(engine)
        del engine  # before the next one is made
        free(bench.device)
        yield Point(
            "generate",
            f"position {position}",
            "engine",
            "step",
            milliseconds,
            floor,
            extra_mebibytes=held,
            note=note,
        )


def by_batch(bench: Bench) -> Iterator[Point]:
    """Many sequences: the states' traffic grows with them, the weights' does not; writing late saves near half."""
    variants = [("engine", 0, 0.0), (f"deferred {RING}", RING, 0.0), ("sampled", 0, 0.8)]
    for batch in bench.options.batch:
        for name, ring, temperature in variants:
            engine = bench.engine(batch, deferred_writes=ring)
            bench.start(engine, batch, bench.options.context, temperature)
            milliseconds, steps = bench.step_milliseconds(engine)
            yield Point(
                "generate",
                f"batch {batch}",
                name,
                "step",
                milliseconds,
                bench.floor(engine, bool(ring)),
                extra_mebibytes=engine.pool.cost.total / 2**20,
                note="memory a slot; " + bench.note(batch, milliseconds, steps),
            )
            del engine
            free(bench.device)


def by_prompt(bench: Bench) -> Iterator[Point]:
    """Time to the first token of one prompt; the first run of a length compiles and is not counted."""
    for length in bench.options.prompts:
        engine = bench.engine()
        times = []
        for _ in range(2):
            generation = engine.submit(Request(bench.prompt(length), 1, Sampling(temperature=0)))
            times.append(seconds(engine.run))
            assert generation.finished
        rate = f"{length / times[-1]:.0f} prompt tokens/s"
        yield Point("generate", f"prompt {length}", "engine", "first token", 1e3 * times[-1], note=rate)


def prefix_hits(bench: Bench) -> Iterator[Point]:
    """The first token of prompts with a shared beginning: read, and found in the cache."""
    length = bench.options.prompts[-1]
    engine = bench.engine(prefix_cache_bytes=4 * bench.engine().pool.cost.state)
    shared = bench.prompt(length)
    for what, seed in (("cold", 1), ("cold", 2), ("hit", 3)):
        if what == "cold":
            shared = bench.prompt(length, seed)
        own = bench.prompt(16, seed)
        engine.submit(Request(shared + own, 1, Sampling(temperature=0), shared=length))
        taken = seconds(engine.run)
    prefix = engine.stats().prefix
    note = f"{prefix.hits} hit, {prefix.misses.total()} missed, {prefix.tokens_saved} tokens not read again"
    yield Point("generate", f"prompt {length + 16}", "engine", "prefix hit", 1e3 * taken, note=note)


def restore(bench: Bench) -> Iterator[Point]:
    """A saved session, from its file to the step that it waits for, beside reading its tokens; the file is cached."""
    length = bench.options.context
    engine = bench.engine()
    generation = engine.submit(Request(bench.prompt(length), 1, Sampling(temperature=0), keep_state=True))
    prefill = seconds(engine.run)
    path = bench.options.csv.with_suffix(".snapshot")
    path.parent.mkdir(parents=True, exist_ok=True)
    engine.snapshot(generation).save(path)
    request, times = Request([], 1, Sampling(temperature=0)), []
    for _ in range(5):
        begin = time.perf_counter()
        again = engine.submit(request, Snapshot.load(path, bench.device))
        times.append(time.perf_counter() - begin)
        engine.run()
    assert again.tokens
    size = path.stat().st_size
    path.unlink()
    note = f"{size / 2**20:.1f} MiB; reading the {length} tokens took {prefill:.2f} s"
    yield Point("generate", f"context {length}", "engine", "restore", 1e3 * statistics.median(times), note=note)


def rival_llama(bench: Bench, cache: str | None = None) -> Iterator[Point]:
    """transformers' Llama, with its growing cache or the static one, whose prompts take as long."""
    model = llama(bench.options.model, bench.device, max(bench.options.prompts) + 1024)
    yield from _rival(bench, "llama dynamic" if cache is None else "llama static", model, cache)


def rival_fla(bench: Bench) -> Iterator[Point]:
    """FLA's RetNet."""
    model = fla_retnet(bench.options.model, bench.device, max(bench.options.prompts) + 1024)
    if model is None:
        print("flash-linear-attention is not installed (pip install retnet[bench]): left out")
        return
    yield from _rival(bench, "fla", model, None)


def _rival(bench: Bench, name: str, model, cache: str | None) -> Iterator[Point]:
    """Steps of `generate` by batch and by position (up to the longest prompt), the first token by prompt length.

    Memory and first tokens of a static cache, which has its size from the start, are those of the growing one.
    """
    prompts = bench.options.prompts
    for batch in bench.options.batch:
        taken = generation_milliseconds(model, batch, bench.options.context, RING, cache)
        yield Point("generate", f"batch {batch}", name, "step", taken, note=f"{1e3 * batch / taken:.1f} tokens/s")
    for position in bench.options.positions:
        if position <= max(prompts):
            held = held_mebibytes(model, position) if cache is None else None
            taken = generation_milliseconds(model, 1, position, RING, cache)
            yield Point("generate", f"position {position}", name, "step", taken, extra_mebibytes=held)
    for length in prompts if cache is None else ():
        yield Point("generate", f"prompt {length}", name, "first token", prompt_milliseconds(model, length))
    free(bench.device)


def weight_bytes(model: LanguageModel) -> int:
    """Of all weights as stored, int8 ones included; an embedding that the head does not share is not read by a step."""
    tensors = []
    for name, weight in model.named_parameters():
        if name == "embedding.weight" and model.head.weight is not weight:
            continue
        parts = [getattr(weight, part, None) for part in ("qdata", "scale")]
        tensors += [x for x in parts if isinstance(x, torch.Tensor)] or [weight]
    return sum(x.numel() * x.element_size() for x in tensors)


def seconds(run) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="retnet-125m")
    parser.add_argument("--sections", default="position,batch,first,prefix", help=", ".join(SECTIONS))
    parser.add_argument("--positions", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024])
    parser.add_argument("--context", type=int, default=64, help="prompt tokens before steps are timed by batch")
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps a point")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--int8", action="store_true", help="weights in int8 (torchao)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=Path("out/bench_generate.csv"))
    parser.add_argument("--plot", type=Path, metavar="PNG", help="only draw what the CSV file has")
    options = parser.parse_args()
    unknown = set(options.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections has {', '.join(sorted(unknown))}; accepted: {', '.join(SECTIONS)}")
    return options


def main() -> None:
    options = parsed()
    if options.plot is not None:
        plot(read(options.csv), options)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options)
    run = {
        "position": by_position,
        "batch": by_batch,
        "first": by_prompt,
        "prefix": prefix_hits,
        "restore": restore,
        "llama": rival_llama,
        "static": lambda bench: rival_llama(bench, "static"),
        "fla": rival_fla,
    }
    print(f"{options.model}, {options.dtype}{', int8 weights' * options.int8}: {weight_bytes(bench.model):,} bytes")
    for section in options.sections.split(","):
        for point in run[section](bench):
            print(table([point]), flush=True)
            append(options.csv, [point])


def plot(points: list[Point], options: argparse.Namespace) -> None:
    def panel(title: str, axis: str, what: str) -> Panel:
        chosen = [p for p in points if p.what == what and p.case.split()[0] == axis]
        drawn = lines(chosen, lambda p: int(p.case.split()[-1]), lambda p: p.milliseconds)
        floor = lines(chosen, lambda p: int(p.case.split()[-1]), lambda p: p.floor_milliseconds)
        if "engine" in floor:
            drawn["floor"] = floor["engine"]
        return Panel(title, axis, "milliseconds", drawn)

    at_positions = [p for p in points if p.case.startswith("position")]
    held = lines(at_positions, lambda p: int(p.case.split()[-1]), lambda p: p.extra_mebibytes)
    panels = [
        *([Panel("memory by position", "position", "MiB", held)] if held else []),
        panel("a step by position", "position", "step"),
        panel("a step by batch", "batch", "step"),
        panel("to the first token by prompt", "prompt", "first token"),
    ]
    save_panels(options.plot, panels, f"{options.model}, {options.dtype}")


if __name__ == "__main__":
    main()
