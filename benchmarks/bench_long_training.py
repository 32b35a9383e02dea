"""Training on rows of up to a million tokens: two or more GPUs that share a row, beside one with the same local length.

    torchrun --nproc_per_node=2 benchmarks/bench_long_training.py [--cases retnet:65536:none ...] [--csv FILE]
    torchrun --nproc_per_node=2 benchmarks/bench_long_training.py --tiny                CPU, gloo

A case is `model:tokens:recompute`: the tokens of a row that all GPUs share, and the recompute policy of both runs
(`retnet/layers/recompute.py`; `+offload` behind it keeps the layers' inputs on the host). "shared" is that row.
"alone" is a row of its own on every GPU, as long as a shard, without any communication. "retnet" is retnet-1.3b;
"gated", "conv" and "hybrid" are its other forms; "llama" is a Llama of the same width and depth, whose keys and values
travel in a ring.

Weights are bfloat16, blocks are compiled, the loss never holds all logits. Parameters, gradients and AdamW are sharded
over the GPUs (FSDP2), on a group of one where a GPU is alone. A row's times are those of the slowest process. Waiting
is the time per layer and step for which a GPU's own work stood still for an exchange between shards; bytes are what a
process receives for it.

Cases that would begin after --deadline seconds are left out. A step longer than --long seconds is timed once.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from runner import Point, arguments, join_processes, report
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from retnet import LanguageModel, ModelConfig
from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.recompute import Recompute
from retnet.models.cost import parameter_counts
from retnet.models.presets import preset
from retnet.ops.context_shard import ContextShard

CASES = (
    "retnet:65536:none",
    "retnet:262144:medium",
    "retnet:1048576:layer",
    "llama:65536:none",
    "llama:262144:layer",
)
TINY_CASES = ("retnet:128:none", "hybrid:128:light", "retnet:256:layer", "llama:128:layer")
UNSHARED = "retnet:32768:none"  # alone: the unrecomputed rate that long rows are compared with


def llama_like(config: ModelConfig) -> ModelConfig:
    """A Llama of the width and depth, with about as many parameters."""
    width, heads = config.d_model, max(2, config.d_model // 128)
    hidden = 8 * width // 3 // 64 * 64 or 2 * width
    attention = AttentionConfig(heads, heads, head_dim=width // heads)
    block = BlockConfig(attention, FeedForwardConfig(hidden, gated=True, activation="swish"), norm="rms")
    return replace(config, layers=(block,) * len(config.layers), final_norm="rms", name="llama")


def config_of(name: str, tiny: bool) -> ModelConfig:
    """The configuration of a model of a case. Raises ValueError for an unknown one."""
    size = "retnet-1.3b"
    forms = {"retnet": size, "gated": f"{size}-gated", "conv": f"{size}-conv", "hybrid": f"{size}-hybrid"}
    if name not in (*forms, "llama"):
        raise ValueError(f"model is {name!r}; accepted: {', '.join(forms)}, llama")
    config = preset(forms.get(name, size))
    if tiny:
        config = tiny_of(config)
    return llama_like(config) if name == "llama" else config


def tiny_of(config: ModelConfig) -> ModelConfig:
    """Four layers of width 32 of the same kinds."""

    def small(layer: BlockConfig) -> BlockConfig:
        mixer: Any = layer.mixer
        if isinstance(mixer, AttentionConfig):
            mixer = replace(mixer, num_heads=2, num_kv_heads=1, head_dim=16)
        else:
            mixer = replace(mixer, num_heads=2, key_dim=32, value_dim=64)
        return replace(layer, mixer=mixer, feed_forward=replace(layer.feed_forward, hidden_dim=64))

    layers = tuple(small(layer) for layer in config.layers[-4:])
    return replace(config, vocab_size=257, d_model=32, layers=layers, bos_token_id=None, eos_token_id=None)


@dataclass(frozen=True)
class Case:
    """One model on rows of `tokens` tokens under one policy."""

    model: str
    tokens: int
    policy: Recompute

    @classmethod
    def parse(cls, text: str) -> "Case":
        try:
            model, tokens, level = text.split(":")
            level, offload = level.removesuffix("+offload"), level.endswith("+offload")
            return cls(model, int(tokens), Recompute(level, offload))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"case is {text!r}; accepted: model:tokens:recompute ({error})") from None

    @property
    def policy_name(self) -> str:
        return f"recompute {self.policy.level}{' + offload' if self.policy.offload else ''}"


@dataclass
class Waits:
    """Exchanges between shards: how often, what was received, and how long the GPU's own work stood still."""

    cuda: bool
    received: int = 0
    calls: int = 0
    _events: list[tuple[Any, Any]] = field(default_factory=list)
    _seconds: float = 0.0

    def add(self, wait: Callable[[], object], received: int) -> None:
        self.calls, self.received = self.calls + 1, self.received + received
        if self.cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            wait()
            end.record()
            self._events.append((start, end))
        else:
            begin = time.perf_counter()
            wait()
            self._seconds += time.perf_counter() - begin

    def milliseconds(self) -> float:
        """Of all waits; on a GPU after it has been waited for."""
        return 1e3 * self._seconds + sum(start.elapsed_time(end) for start, end in self._events)


class _TimedWork:
    def __init__(self, waits: Waits, work: Any, received: int):
        self._waits, self._work, self._received = waits, work, received

    def wait(self) -> None:
        self._waits.add(self._work.wait, self._received)


@contextmanager
def watched(waits: Waits) -> Iterator[None]:
    """Exchanges of shards, counted and timed."""
    start, scatter = ContextShard.start_all_gather, ContextShard.reduce_scatter

    def start_all_gather(self: ContextShard, x: Tensor) -> tuple[Tensor, Any]:
        out, work = start(self, x)
        return out, _TimedWork(waits, work, (self.size - 1) * x.nbytes)

    def reduce_scatter(self: ContextShard, parts: Tensor) -> Tensor:
        found: list[Tensor] = []
        waits.add(lambda: found.append(scatter(self, parts)), (self.size - 1) * parts[0].nbytes)
        return found[0]

    ContextShard.start_all_gather, ContextShard.reduce_scatter = start_all_gather, reduce_scatter
    try:
        yield
    finally:
        ContextShard.start_all_gather, ContextShard.reduce_scatter = start, scatter


@dataclass(frozen=True)
class Measured:
    """One run of a case. Numbers are those of the slowest or largest process; bytes are per process and step."""

    seconds: float
    tokens_per_second: float
    peak_bytes: float
    received: float
    waited_milliseconds: float
    calls: float
    layers: int


class Bench:
    """One process."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.begin = options, time.monotonic()
        self.device = join_processes(on_cpu=options.tiny)
        self.cuda = self.device.type == "cuda"
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.together = init_device_mesh(self.device.type, (self.size,))
        self.apart = init_device_mesh(self.device.type, (self.size, 1), mesh_dim_names=("run", "alone"))["alone"]

    def late(self) -> bool:
        """Whether the deadline is over, on the clock of the first process."""
        over = torch.tensor([float(time.monotonic() - self.begin > self.options.deadline)], device=self.device)
        dist.broadcast(over, 0)
        return bool(over.item())

    def highest(self, *values: float) -> list[float]:
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def model(self, case: Case, mesh: DeviceMesh) -> LanguageModel:
        config = replace(config_of(case.model, self.options.tiny), dtype="bfloat16" if self.cuda else "float32")
        with self.device:
            model = LanguageModel(config).train()
        model.recompute = case.policy
        for name, layer in list(model.layers.named_children()):
            if self.options.backend:  # a compiled module inside: its hooks, which gather weights, stay outside
                layer = torch.compile(layer, backend=self.options.backend, dynamic=False)
                model.layers.register_module(name, layer)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")
        return model

    def run(self, case: Case, shared: bool) -> Measured:
        """Train a few steps on one row."""
        local = case.tokens // self.size
        shard = ContextShard.of(case.tokens) if shared else None
        model = self.model(case, self.together if shared else self.apart)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=self.cuda)
        generator = torch.Generator(self.device).manual_seed(self.rank)
        row = torch.randint(256, (1, local + 1), generator=generator, device=self.device)
        weight = self.size if shared else 1  # FSDP takes the mean of gradients, and shards add up

        def step() -> None:
            (weight * model.loss(row[:, :-1], row[:, 1:], context=shard)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        first = self._seconds(step)  # compiles
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        short = self.highest(self._seconds(step) if first < 2 * self.options.long else first)[0]
        if short < self.options.long:
            times = [self._seconds(step) for _ in range(max(1, min(5, int(self.options.budget / short))))]
            short = self.highest(sorted(times)[len(times) // 2])[0]
        waits = Waits(self.cuda)
        if shared and short < self.options.long:
            with watched(waits):
                self._seconds(step)
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        peak, received, waited, calls = self.highest(peak, waits.received, waits.milliseconds(), waits.calls)
        return Measured(short, local / short, peak, received, waited, calls, len(model.layers))

    def _seconds(self, step: Callable[[], None]) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        step()
        if self.cuda:
            torch.cuda.synchronize()
        return self.highest(time.perf_counter() - begin)[0]

    def report(self, case: Case, name: str, run: Measured, note: str = "") -> None:
        if self.rank:
            return
        per_layer = ""
        if run.calls:
            per_layer = f", received per layer {run.received / run.layers / 1e6:.1f} MB"
            per_layer += f", waited per layer {1e3 * run.waited_milliseconds / run.layers:.0f} us"
        facts = f"{run.tokens_per_second:.0f} tokens/s per GPU, {case.policy_name}{per_layer}{note}"
        tokens = case.tokens if name == "shared" else case.tokens // self.size
        title = f"{case.model} T={tokens} on {self.size if name == 'shared' else 1}"
        report([Point("long training", title, name, "step", 1e3 * run.seconds, extra_bytes=run.peak_bytes, note=facts)],
               self.options.csv)  # fmt: skip

    def compare(self, case: Case, unshared: float | None) -> None:
        """A row alone, and one that the GPUs share."""
        alone = self.run(case, False)
        self.report(case, "alone", alone)
        self._clear()
        shared = self.run(case, True)
        note = f", {shared.tokens_per_second / alone.tokens_per_second:.1%} of alone"
        if unshared is not None and case.model == "retnet":
            note += f", {shared.tokens_per_second / unshared:.1%} of alone at T = {Case.parse(UNSHARED).tokens}"
        self.report(case, "shared", shared, note)
        self._clear()

    def _clear(self) -> None:
        gc.collect()
        torch._dynamo.reset()
        if self.cuda:
            torch.cuda.empty_cache()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", nargs="+", default=None, metavar="CASE", help=f"(default: {' '.join(CASES)})")
    parser.add_argument("--deadline", type=float, default=330, help="seconds after which no case begins")
    parser.add_argument("--budget", type=float, default=6, help="seconds of timed steps per run")
    parser.add_argument("--long", type=float, default=20, help="seconds from which a step is timed once")
    parser.add_argument("--backend", default=None, help="of torch.compile; '' for none (default: inductor on GPUs)")
    parser.add_argument("--tiny", action="store_true", help="small models on CPUs")
    options = parser.parse_args()
    cases = [Case.parse(text) for text in options.cases or (TINY_CASES if options.tiny else CASES)]
    bench, unshared = Bench(options), None
    if options.backend is None:
        options.backend = "inductor" if bench.cuda else ""
    if bench.rank == 0:
        names = dict.fromkeys(case.model for case in cases)
        sizes = {name: parameter_counts(config_of(name, options.tiny))["total"] for name in names}
        print(", ".join(f"{name}: {count / 1e9:.3f}B parameters" for name, count in sizes.items()), flush=True)
    for case in cases:
        if bench.late():
            if bench.rank == 0:
                print(f"left out after {options.deadline:.0f} s: {case}", flush=True)
            continue
        if unshared is None and case.model == "retnet" and not options.tiny:
            first = Case.parse(UNSHARED)
            run = bench.run(replace(first, tokens=first.tokens * bench.size), False)
            bench.report(replace(first, tokens=first.tokens * bench.size), "alone", run)
            unshared = run.tokens_per_second
            bench._clear()
        bench.compare(case, unshared)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
