"""Errors of context parallelism in bfloat16, beside the errors of one GPU: both against float64 on the same inputs.

    torchrun --nproc_per_node=2 benchmarks/check_context_parallel.py                  two GPUs, NCCL; about a minute
    torchrun --nproc_per_node=2 benchmarks/check_context_parallel.py --tiny           CPU, gloo, float32

Every process computes the whole row on its own device, and its shard of it together with the others. An error is
norm(x - reference) / norm(reference) over all processes: of the outputs (operators) or of the loss (models), and of the
gradient that is worst. A case passes if the shards' errors are at most twice those of one device or, for retention, of
its parallel form in plain operators of the same dtype. At the end, the exchange of states is broken in several ways,
and each must fail. The script exits with 1 if anything does otherwise.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from runner import join_processes
from torch import Tensor

from retnet import LanguageModel, ModelConfig, retention
from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.retention import RetentionConfig
from retnet.ops import context_parallel, context_shard, reference
from retnet.ops.context_parallel import When, context_retention, context_scan
from retnet.ops.context_shard import ContextShard
from retnet.ops.context_states import Decays
from retnet.ops.selective_scan import selective_scan

FACTOR = 2.0  # times the error of one device that shards may have, as for the forms of retention
ROUNDING = 1e-6  # an error below it passes: float32 on a CPU may be exact on one device
BROKEN = 5  # times the error of one device that a broken exchange must have

Errors = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """tokens: of a shard. heads, keys, values: of retention; channels, states: of the scan; width: of models."""

    tokens: int = 1024
    heads: int = 4
    keys: int = 128
    values: int = 256
    channels: int = 256
    states: int = 16
    width: int = 256
    vocab: int = 512


TINY = Sizes(tokens=64, heads=2, keys=8, values=16, channels=16, states=4, width=32, vocab=61)


class Run:
    """One process: its device, the dtype under test, and the tables of its cases."""

    def __init__(self, tiny: bool):
        self.sizes = TINY if tiny else Sizes()
        self.device = join_processes(on_cpu=tiny)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.wrong: list[str] = []

    def bounds(self, packing: str) -> list[int] | None:
        """Documents of the row: none, over the borders of shards, many short ones."""
        tokens, total = self.sizes.tokens, self.sizes.tokens * self.size
        return {
            "rows": None,
            "packs": [0, tokens // 2, tokens + tokens // 4, total - 3, total],
            "short": [0, *range(tokens // 8, total, tokens // 4), total],
        }[packing]

    def shard(self, packing: str) -> ContextShard:
        return ContextShard.of(self.sizes.tokens * self.size, self.bounds(packing))

    @property
    def mine(self) -> slice:
        return slice(self.rank * self.sizes.tokens, (self.rank + 1) * self.sizes.tokens)

    def rounded(self, x: Tensor) -> Tensor:
        """float64 numbers that the dtype under test has."""
        return x.to(self.dtype).double()

    def summed(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def norm(self, parts: list[Tensor], over_all: bool) -> float:
        square = torch.stack([x.double().square().sum().cpu() for x in parts]).sum().to(self.device)
        return (self.summed(square) if over_all else square).sqrt().item()

    def error(self, found: list[Tensor], expected: list[Tensor], over_all: bool) -> float:
        wrong = [x.double().cpu() - y.cpu() for x, y in zip(found, expected, strict=True)]
        return self.norm(wrong, over_all) / max(1e-300, self.norm(expected, over_all))

    def report(self, name: str, shards: Errors, one: Errors, broken: bool = False) -> None:
        """A line of the table. `broken`: the case must fail."""
        worst = max(shards[kind] / max(one[kind], ROUNDING / FACTOR) for kind in shards)
        passed = worst >= BROKEN if broken else worst <= FACTOR
        if not passed:
            self.wrong.append(name)
        if self.rank == 0:
            gradient = max(shards, key=lambda kind: shards[kind] / max(one[kind], ROUNDING))
            verdict = (
                ("fails, as it must" if passed else "PASSES, BUT IS BROKEN") if broken else "ok" if passed else "X"
            )
            first = next(iter(shards))
            print(
                f"{name:46s} {first:5s} {shards[first]:.2e} / {one[first]:.2e}   worst {gradient:24s} "
                f"{shards[gradient]:.2e} / {one[gradient]:.2e}   {worst:8.2f}x  {verdict}",
                flush=True,
            )


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def slow_decays(generator: torch.Generator, *shape: int) -> Tensor:
    """Log decays in [-1, -1e-6], as many of each order of magnitude: what crosses a border must matter."""
    exponents = -6 * torch.rand(*shape, dtype=torch.float64, generator=generator)
    return -(10**exponents).float().double()


# (leaves of the whole row, options of it) and (the same of a shard, the shard) -> outputs, which are then weighted
Operator = Callable[..., tuple[Tensor, Tensor]]


def operator_errors(
    run: Run,
    leaves: dict[str, Tensor],
    shared: set[str],
    whole: Operator,
    part: Operator,
    packing: str,
    plain: Operator | None = None,
) -> tuple[Errors, Errors]:
    """Errors of an operator on shards and on one device. whole(leaves), part(leaves, shard); `shared`: leaves that all
    tokens read; plain(leaves): the same as `whole`, whose error counts as one device's where it is larger."""
    generator, mine = torch.Generator().manual_seed(5), run.mine
    narrow = {name: x.dtype for name, x in leaves.items()}

    def gradients(function: Operator, given: dict[str, Tensor], weights: tuple[Tensor, ...]) -> list[Tensor]:
        given = {name: x.detach().requires_grad_() for name, x in given.items()}
        outputs = function(given)
        loss = sum((x * weight.to(x.dtype)).sum() for x, weight in zip(outputs, weights, strict=True))
        return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, list(given.values()))]

    wide = {name: x.double() for name, x in leaves.items()}
    with torch.no_grad():
        shapes = [x.shape for x in whole(wide)]
    weights = run.rounded(drawn(generator, *shapes[0])), run.rounded(drawn(generator, *shapes[1]))
    if packing != "rows":  # final states of documents are compared through the gradients of the tokens alone
        weights = weights[0], torch.zeros_like(weights[1])
    names = ["out", "state", *(f"d {name}" for name in leaves)]
    expected = dict(zip(names, gradients(whole, wide, weights), strict=True))
    on_device = {name: x.to(run.device, narrow[name]) for name, x in leaves.items()}
    there = tuple(w.to(run.device) for w in weights)
    found = [dict(zip(names, gradients(f, on_device, there), strict=True)) for f in (whole, plain) if f is not None]

    def cut(name: str, x: Tensor) -> Tensor:
        return x if name.removeprefix("d ") in shared else x[:, mine]

    last = run.rank == run.size - 1
    own = cut("out", weights[0]).to(run.device), weights[1].to(run.device) * (1.0 if last else 0.0)
    if packing != "rows":
        own = own[0], torch.zeros(1, device=run.device)
    shard = run.shard(packing)
    given = {name: cut(name, x) for name, x in on_device.items()}
    mixed = dict(zip(names, gradients(partial(part, shard=shard), given, own), strict=True))
    for name in sorted(shared):  # in one order on all processes
        mixed[f"d {name}"] = run.summed(mixed[f"d {name}"].clone())
    kept = [name for name in names if name != "state" or packing == "rows"]
    shards, one = {}, {}
    for name in kept:
        if name == "state":
            reference = [expected[name] if last else torch.zeros_like(expected[name])]
            shards[name] = run.error([mixed[name] if last else reference[0]], reference, True)
        else:
            shards[name] = run.error([mixed[name]], [cut(name, expected[name])], True)
        one[name] = max(run.error([results[name]], [expected[name]], False) for results in found)
    return shards, one


def check_retention(
    run: Run, packing: str, per_token: bool, masked: bool, given: bool, exchange: When, broken: str = ""
) -> None:
    """given: a state before the first token."""
    s, generator = run.sizes, torch.Generator().manual_seed(1)
    T, H = s.tokens * run.size, s.heads
    q, k, v = (run.rounded(drawn(generator, 1, T, H, width)).to(run.dtype) for width in (s.keys, s.keys, s.values))
    decay = slow_decays(generator, 1, T, H) if per_token else slow_decays(generator, H)
    mask = torch.rand(1, T, generator=generator) < 0.9 if masked else None
    bounds, leaves = run.bounds(packing), {"q": q, "k": k, "v": v, "decay": decay.float()}
    shared = set() if per_token else {"decay"}
    if given:
        leaves["before"] = drawn(generator, 1, H, s.keys, s.values).float()
        shared.add("before")

    def options(x: Tensor, tokens: slice, documents: list[int] | tuple[int, ...] | None) -> dict:
        return {
            "mask": None if mask is None else mask[:, tokens].to(x.device),
            "cu_seqlens": None if documents is None else torch.tensor(documents, device=x.device),
        }

    def whole(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return retention(
            x["q"], x["k"], x["v"], x["decay"], state=x.get("before"), **options(x["q"], slice(None), bounds)
        )

    def plain(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        q, more = x["q"], options(x["q"], slice(None), bounds)
        return reference.parallel(q, x["k"], x["v"], x["decay"], state=x.get("before"), **more)

    def part(x: dict[str, Tensor], shard: ContextShard) -> tuple[Tensor, Tensor]:
        before = x.get("before")
        state = before if before is None or shard.rank == 0 else before * 0
        more = options(x["q"], run.mine, shard.bounds)
        return context_retention(x["q"], x["k"], x["v"], x["decay"], shard, state=state, exchange=exchange, **more)

    names = ["retention", "gated" if per_token else "fixed", packing, *(["masked"] if masked else [])]
    names += [
        *(["state in"] if given else []),
        *([] if exchange == "after" else [exchange]),
        *([broken] if broken else []),
    ]
    errors = operator_errors(run, leaves, shared, whole, part, packing, plain)
    run.report(" ".join(names), *errors, broken=bool(broken))


def check_scan(run: Run, packing: str) -> None:
    s, generator = run.sizes, torch.Generator().manual_seed(2)
    T, D, N = s.tokens * run.size, s.channels, s.states
    leaves = {
        "x": run.rounded(drawn(generator, 1, T, D)).to(run.dtype),
        "step": -slow_decays(generator, 1, T, D).float(),
        "rate": -drawn(generator, D, N).exp().float(),
        "write": run.rounded(drawn(generator, 1, T, N)).to(run.dtype),
        "read": run.rounded(drawn(generator, 1, T, N)).to(run.dtype),
    }
    bounds = run.bounds(packing)

    def documents(x: Tensor, ends: list[int] | tuple[int, ...] | None) -> Tensor | None:
        return None if ends is None else torch.tensor(ends, device=x.device)

    def whole(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return selective_scan(*x.values(), cu_seqlens=documents(x["x"], bounds))

    def part(x: dict[str, Tensor], shard: ContextShard) -> tuple[Tensor, Tensor]:
        return context_scan(*x.values(), shard, cu_seqlens=documents(x["x"], shard.bounds))

    run.report(f"selective scan {packing}", *operator_errors(run, leaves, {"rate"}, whole, part, packing))


def layers_of(run: Run) -> dict[str, tuple[BlockConfig, ...]]:
    """Stacks by name. Heads are as wide as the Hopper kernels want them."""
    s = run.sizes
    K, V = s.keys * s.heads // 2, s.values * s.heads // 2
    wide = FeedForwardConfig(2 * s.width, gated=True, activation="swish")
    gammas = (0.999, 0.99999)
    fixed = BlockConfig(RetentionConfig(2, K, V, decay=gammas), wide)
    conv = replace(fixed, mixer=RetentionConfig(2, K, V, decay="gated", conv_width=4, gated_start="experiment"))
    mamba2 = BlockConfig(Mamba2Config(2 * s.width, head_dim=s.width // 4, state_dim=s.keys), None, norm="rms")
    mamba1 = BlockConfig(Mamba1Config(2 * s.width, time_step_rank=max(2, s.width // 16), state_dim=s.states), None)
    attention = BlockConfig(AttentionConfig(4, 2, head_dim=s.width // 4), wide, norm="rms")
    window = replace(attention, mixer=replace(attention.mixer, window=s.tokens // 3))
    return {
        "retention": (fixed, fixed),
        "gated + convolution": (conv, conv),
        "Mamba-2": (mamba2, mamba2),
        "Mamba": (mamba1, mamba1),
        "attention": (attention, attention),
        "window": (window, window),
        "hybrid": (fixed, attention, mamba2, conv),
    }


def check_model(run: Run, name: str, packing: str, compiled: bool = False, broken: str = "") -> None:
    """Loss and gradients of a stack; every gradient is a sum over the processes."""
    s, generator = run.sizes, torch.Generator().manual_seed(3)
    config = ModelConfig(s.vocab, s.width, layers_of(run)[name], tie_embeddings=False, name=name, dtype="float64")
    reference = LanguageModel(config).train()
    with torch.no_grad():
        for weight in reference.parameters():
            if weight.dim() > 1:  # unit gain: with small weights, a broken exchange passes
                weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
            weight.copy_(run.rounded(weight))
    model = copy.deepcopy(reference).to(run.device, run.dtype)
    if compiled:
        for layer in model.layers:
            layer.compile(dynamic=False)
    rows = torch.randint(s.vocab, (1, s.tokens * run.size + 1), generator=generator)
    ids, labels = rows[:, :-1], rows[:, 1:]
    bounds, shard, mine = run.bounds(packing), run.shard(packing), run.mine
    documents = None if bounds is None else torch.tensor(bounds)

    def results(model: LanguageModel, loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected = results(reference, reference.loss(ids, labels, cu_seqlens=documents))
    ids, labels = ids.to(run.device), labels.to(run.device)
    packed = None if documents is None else documents.to(run.device)
    found = results(model, model.loss(ids, labels, cu_seqlens=packed))
    part = results(model, model.loss(ids[:, mine], labels[:, mine], context=shard))
    part = [run.summed(x.float()) for x in part]
    names = ["loss", *(f"d {name}" for name, _ in model.named_parameters())]
    shards = {name: run.error([x], [y], False) for name, x, y in zip(names, part, expected, strict=True)}
    one = {name: run.error([x], [y], False) for name, x, y in zip(names, found, expected, strict=True)}
    together = {"loss": shards["loss"], "all gradients": run.error(part[1:], expected[1:], False)}
    alone = {"loss": max(one["loss"], ROUNDING), "all gradients": run.error(found[1:], expected[1:], False)}
    # One loss is one number, and may be exact by chance: only a broken exchange is judged by it as well.
    judged = together if broken else {"grads": together["all gradients"]}
    against = alone if broken else {"grads": alone["all gradients"]}
    title = " ".join(["model:", name, packing, *(["compiled"] if compiled else []), *([broken] if broken else [])])
    if run.rank == 0:
        worst = max(names[1:], key=lambda n: shards[n] / max(one[n], ROUNDING))
        print(
            f"{'':46s} loss {together['loss']:.1e} / {one['loss']:.1e}; {worst} {shards[worst]:.1e} / {one[worst]:.1e}"
        )
    run.report(title, judged, against, broken=bool(broken))


UPTO = Decays.upto


@contextmanager
def broken_exchange(how: str) -> Iterator[None]:
    """The exchange without carried states, without their decay on a shard or between shards, or without gradients."""

    def nothing(shard: ContextShard, states: Tensor, totals: Tensor) -> Tensor:
        return torch.zeros_like(states[0])

    name, value = {
        "without exchange": ("from_before", nothing),
        "without decay": ("upto", lambda decays: torch.zeros_like(UPTO(decays))),
        "without decay between": ("_weight", lambda totals, before, rank: torch.ones_like(totals[rank])),
        "without backward": ("from_after", nothing),
    }[how]
    modules = [module for module in (context_shard, context_parallel, Decays) if hasattr(module, name)]
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(patch.object(module, name, value))
        yield


def check_all(run: Run, compile_too: bool) -> None:
    for per_token in (False, True):
        for packing in ("rows", "packs", "short"):
            check_retention(run, packing, per_token, False, packing == "rows", "after")
            check_retention(run, packing, per_token, packing != "short", False, "during")
    check_retention(run, "rows", False, False, True, "before")
    check_retention(run, "packs", True, True, False, "before")
    for packing in ("rows", "packs"):
        check_scan(run, packing)
    for name in layers_of(run):
        for packing in ("rows", "packs"):
            check_model(run, name, packing)
    if compile_too:
        for packing in ("rows", "packs"):
            check_model(run, "hybrid", packing, compiled=True)
    ways = ["without exchange", "without decay", "without backward"]
    for how in [*ways, *(["without decay between"] if run.size > 2 else [])]:  # two shards have none between them
        with broken_exchange(how):
            check_retention(run, "rows", True, False, False, "after", broken=how)
            check_model(run, "retention", "rows", broken=how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes in float32 on CPUs")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled blocks")
    options = parser.parse_args()
    begin = time.monotonic()
    run = Run(options.tiny)
    if run.rank == 0:
        print(f"{run.size} shards of {run.sizes.tokens} tokens, {run.dtype}; errors: shards / one device", flush=True)
    check_all(run, not options.no_compile)
    if run.rank == 0:
        print(f"{time.monotonic() - begin:.0f} s; wrong: {', '.join(run.wrong) or 'none'}", flush=True)
    dist.destroy_process_group()
    sys.exit(1 if run.wrong else 0)


if __name__ == "__main__":
    main()
