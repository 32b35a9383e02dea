"""Generation by the engine: time per step by position and batch, time to first token, prefix cache hits, memory.

    python benchmarks/bench_generate.py --model retnet-125m --sections batch,first --threads 2
    python benchmarks/bench_generate.py --model retnet-1.3b --dtype bfloat16

Weights are random; only a preset's shapes matter. Time per step is the host's, including Python and the copy of
tokens, as a user waits for it. It is the median over groups of 32 steps, so that deferred writes are included. The
floor is the time to read the weights once and to read and write the states once, at the copy bandwidth of the same
run. With deferred writes, states are written once per 32 steps, and the ring of waiting rows is not counted. A
position is reached by a prompt of that many tokens. Rivals, if installed: transformers' Llama with a growing cache and
with a static cache (the latter compiled), and FLA's RetNet.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import runner
import torch
from plots import BYTES, LENGTHS, last_number, lines, save_panels
from rivals import fla_retnet, generation_milliseconds, held_bytes, llama, prompt_milliseconds
from runner import Point, arguments, read, report

from retnet.models.decode.int8 import quantize_int8_
from retnet.models.decode.sampling import Sampling
from retnet.models.lm import LanguageModel
from retnet.models.presets import preset
from retnet.models.snapshot import Snapshot
from retnet.plots.numbers import tokens
from retnet.plots.panels import Panel, Scale
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from retnet.system.sizes import format_bytes

WARM_UP_STEPS = 5
RING = 32  # tokens per deferred write
CPU_COPY_BYTES = 1 << 28  # several times the caches of any CPU so far
PROMPT_CHUNKS = {"cpu": 256, "cuda": 8192}
SECTIONS = ("position", "batch", "first", "prefix", "restore", "llama", "static", "fla")


class Bench:
    """One model on one device, shared by all sections."""

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
        chunk = PROMPT_CHUNKS[self.device.type]
        engine = Engine(self.model, num_slots=slots, prompt_chunk=chunk, prompt_budget=64 * chunk, **options)
        engine.warmup()
        return engine

    def floor(self, engine: Engine, deferred: bool = False) -> float:
        """Milliseconds per step; a tied embedding is counted once, for the head."""
        state = engine.pool.state.nbytes * (1 + 1 / RING if deferred else 2)
        return 1e3 * (weight_bytes(self.model) + state) / self.bandwidth

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.model.config.vocab_size, (length,), generator=generator).tolist()

    def start(self, engine: Engine, count: int, length: int, temperature: float = 0.0) -> float:
        """Start `count` endless requests with prompts of `length`; seconds to the first request's first token."""
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
        """(median over groups of steps, number of steps): as many as fit into --seconds, in groups of RING steps.

        On a CPU the copy bandwidth is measured again, because other processes use the memory too.
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
    """One sequence at short and long contexts: the same time, the same memory to the byte."""
    for position in bench.options.positions:
        engine = bench.engine()
        bench.start(engine, 1, position)
        before = allocated(bench.device)
        milliseconds, steps = bench.step_milliseconds(engine)
        grown = allocated(bench.device) - before
        slot = engine.pool.cost.total
        note = f"memory grew by {grown} bytes; {slot} bytes per slot; " + bench.note(1, milliseconds, steps)
        held = before or slot  # memory of the device, or on a CPU of the slot
        floor = bench.floor(engine)
        del engine  # before the next one is created
        free(bench.device)
        case = f"position {position}"
        yield Point("generate", case, "engine", "step", milliseconds, floor, extra_bytes=held, note=note)


def by_batch(bench: Bench) -> Iterator[Point]:
    """Time per step by batch. State traffic grows with the batch, weight traffic does not; deferred writes halve it
    nearly."""
    variants = [("engine", 0, 0.0), (f"deferred {RING}", RING, 0.0), ("sampled", 0, 0.8)]
    for batch in bench.options.batch:
        for name, ring, temperature in variants:
            engine = bench.engine(batch, deferred_writes=ring)
            bench.start(engine, batch, bench.options.context, temperature)
            milliseconds, steps = bench.step_milliseconds(engine)
            floor, slot = bench.floor(engine, bool(ring)), engine.pool.cost.total
            note = "memory per slot; " + bench.note(batch, milliseconds, steps)
            yield Point("generate", f"batch {batch}", name, "step", milliseconds, floor, extra_bytes=slot, note=note)
            del engine
            free(bench.device)


def by_prompt(bench: Bench) -> Iterator[Point]:
    """Time to first token by prompt length; the first run of a length compiles and is not counted."""
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
    """Time to first token of a prompt whose beginning is in the prefix cache."""
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
    note = f"{prefix.hits} hit, {prefix.misses.total()} missed, {prefix.tokens_saved} prompt tokens saved"
    yield Point("generate", f"prompt {length + 16}", "engine", "prefix hit", 1e3 * taken, note=note)


def restore(bench: Bench) -> Iterator[Point]:
    """Restoring a saved session: time from its file, which is in the page cache, to being ready for a step."""
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
    note = f"{format_bytes(size)}; prefill of the {length} tokens took {prefill:.2f} s"
    yield Point("generate", f"context {length}", "engine", "restore", 1e3 * statistics.median(times), note=note)


def rival_llama(bench: Bench, cache: str | None = None) -> Iterator[Point]:
    """transformers' Llama with a growing cache (None) or a static one ("static")."""
    model = llama(bench.options.model, bench.device, max(bench.options.prompts) + 1024)
    yield from _rival(bench, "llama dynamic" if cache is None else "llama static", model, cache)


def rival_fla(bench: Bench) -> Iterator[Point]:
    """FLA's RetNet."""
    model = fla_retnet(bench.options.model, bench.device, max(bench.options.prompts) + 1024)
    if model is not None:
        yield from _rival(bench, "fla", model, None)


def _rival(bench: Bench, name: str, model, cache: str | None) -> Iterator[Point]:
    """Time per step of `generate` by batch and by position (up to the longest prompt), time to first token by prompt.

    Memory and time to first token are not measured again for a static cache.
    """
    prompts = bench.options.prompts
    for batch in bench.options.batch:
        taken = generation_milliseconds(model, batch, bench.options.context, RING, cache)
        yield Point("generate", f"batch {batch}", name, "step", taken, note=f"{1e3 * batch / taken:.1f} tokens/s")
    for position in bench.options.positions:
        if position <= max(prompts):
            held = held_bytes(model, position) if cache is None else None
            taken = generation_milliseconds(model, 1, position, RING, cache)
            yield Point("generate", f"position {position}", name, "step", taken, extra_bytes=held)
    for length in prompts if cache is None else ():
        yield Point("generate", f"prompt {length}", name, "first token", prompt_milliseconds(model, length))
    free(bench.device)


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of the weights that a step reads, as stored (int8 included). A step does not read an untied embedding."""
    tensors = []
    for name, weight in model.named_parameters():
        if name == "embedding.weight" and model.head.weight is not weight:
            continue
        parts = [getattr(weight, part, None) for part in ("qdata", "scale")]
        tensors += [x for x in parts if isinstance(x, torch.Tensor)] or [weight]
    return sum(x.nbytes for x in tensors)


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
    parser = arguments(__doc__, csv="out/bench_generate.csv")
    parser.add_argument("--model", default="retnet-125m")
    parser.add_argument("--sections", default="position,batch,first,prefix", help=", ".join(SECTIONS))
    parser.add_argument("--positions", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024])
    parser.add_argument("--context", type=int, default=64, help="prompt tokens of the sections batch and restore")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on the steps of a point")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--int8", action="store_true", help="weights in int8 (torchao)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="only plot the rows of the CSV file")
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
    size = format_bytes(weight_bytes(bench.model))
    print(f"{options.model}, {options.dtype}{', int8' * options.int8}: {size} of weights")
    for section in options.sections.split(","):
        report(run[section](bench), options.csv)


def plot(points: list[Point], options: argparse.Namespace) -> None:
    milliseconds = Scale("ms per step", log=10)

    def panel(title: str, axis: str, x: Scale, y: Scale, what: str) -> Panel:
        chosen = [p for p in points if p.what == what and p.case.split()[0] == axis]
        engine = [replace(p, implementation="floor") for p in chosen if p.implementation == "engine"]
        drawn = lines(chosen, last_number, lambda p: p.milliseconds)
        return Panel(title, x, y, drawn | lines(engine, last_number, lambda p: p.floor_milliseconds))

    at_positions = [p for p in points if p.case.startswith("position")]
    held = lines(at_positions, last_number, lambda p: p.extra_bytes)
    panels = [
        Panel("Memory, weights included", LENGTHS, BYTES, held),
        panel("Time per step, one sequence", "position", LENGTHS, milliseconds, "step"),
        panel("Time per step by batch", "batch", Scale("sequences per step", log=2), milliseconds, "step"),
        panel(
            "Time to first token",
            "prompt",
            Scale("prompt length, tokens", tokens, 2),
            Scale("ms", log=10),
            "first token",
        ),
    ]
    save_panels(options.plot, panels, f"Generation with {options.model}", points, options.dtype)


if __name__ == "__main__":
    main()
