"""Speed of two checkouts, measured in turns: every case alternates between them, and a ratio is of two neighbours.

    git worktree add ../before COMMIT
    python benchmarks/compare_trees.py ../before . --rounds 7
    python benchmarks/compare_trees.py ../before . --device cuda --cases operator,engine

Each checkout has its own process, which imports its package and is idle while the other one measures. Cases use only
public names that both checkouts have. Times are milliseconds: `device` is a captured graph on a GPU, `host` the launch
of an eager call without waiting for it, `wall` a call on a CPU, `token` one step of the engine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Measure = Callable[[], float]
GPU_SHAPES = (
    (4, 8192, 8, 256, 512),
    (16, 2048, 8, 256, 512),
    (1, 32768, 8, 256, 512),
    (1, 131072, 8, 256, 512),
    (4, 8192, 16, 128, 128),
    (8, 4096, 16, 64, 128),
)
CPU_SHAPES = ((1, 8192, 8, 128, 256), (1, 4096, 8, 256, 512), (8, 64, 3, 96, 192), (1, 1, 8, 256, 512))


def operator_cases(device: str) -> Iterator[tuple[str, Measure]]:
    """Fixed decay everywhere; decay per token, packed rows, shared queries and keys at one shape."""
    import torch

    from retnet import retention

    def case(
        name: str, B: int, T: int, G: int, H: int, K: int, V: int, *, per_token: bool = False, packed: bool = False
    ):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        q, k = (torch.randn(B, T, G, K, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
        v = torch.randn(B, T, H, V, device=device, dtype=dtype, requires_grad=True)
        log_decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(H, device=device)))
        if per_token:
            log_decay = (log_decay * torch.rand(B, T, H, device=device)).requires_grad_()
        bounds = torch.tensor([0, T // 3, T // 2, T], device=device) if packed else None
        dout = torch.randn(B, T, H, V, device=device, dtype=dtype)
        leaves = [q, k, v, *([log_decay] if per_token else [])]

        def forward():
            with torch.no_grad():
                return retention(q, k, v, log_decay, cu_seqlens=bounds, return_state=False)

        def both():
            out, _ = retention(q, k, v, log_decay, cu_seqlens=bounds, return_state=False)
            return torch.autograd.grad(out, leaves, dout)

        for what, run in (("forward", forward), ("forward + backward", both)):
            if device == "cuda":
                yield f"{name} {what}, device", lambda run=run: device_milliseconds(run)
                yield f"{name} {what}, host", lambda run=run: host_milliseconds(run)
            else:
                yield f"{name} {what}, wall", lambda run=run: wall_milliseconds(run)

    for B, T, H, K, V in GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        yield from case(f"{B},{T},{H},{K},{V}", B, T, H, H, K, V)
    B, T, H, K, V = (4, 4096, 8, 128, 128) if device == "cuda" else (1, 2048, 4, 64, 64)
    yield from case(f"{B},{T},{H},{K},{V} per token", B, T, H, H, K, V, per_token=True)
    yield from case(f"{B},{T},{H},{K},{V} one group, per token", B, T, 1, H, K, V, per_token=True)
    yield from case(f"1,{B * T},{H},{K},{V} packed", 1, B * T, H, H, K, V, packed=True)


def scan_cases(device: str) -> Iterator[tuple[str, Measure]]:
    """Mamba's selective scan."""
    import torch

    from retnet.ops.selective_scan import selective_scan

    B, T, D, N = (4, 4096, 2048, 16) if device == "cuda" else (1, 512, 256, 16)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, read, write = (torch.randn(B, T, width, device=device, dtype=dtype) for width in (D, N, N))
    step = torch.rand(B, T, D, device=device).mul_(0.1)
    rate = -torch.rand(D, N, device=device) - 0.5
    leaves = [z.requires_grad_() for z in (x, step, rate, write, read)]
    dy = torch.randn(B, T, D, device=device, dtype=dtype)

    def both():
        return torch.autograd.grad(selective_scan(*leaves)[0], leaves, dy)

    yield "scan forward + backward", lambda: device_milliseconds(both) if device == "cuda" else wall_milliseconds(both)


def convolution_cases(device: str) -> Iterator[tuple[str, Measure]]:
    """The short convolution of width 4."""
    import torch

    from retnet.ops.short_convolution import short_convolution

    B, T, C = (4, 8192, 4096) if device == "cuda" else (1, 1024, 512)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(B, T, C, device=device, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(*shape, device=device, dtype=dtype, requires_grad=True) for shape in ((C, 1, 4), (C,)))
    dy = torch.randn(B, T, C, device=device, dtype=dtype)

    def forward():
        with torch.no_grad():
            return short_convolution(x, weight, bias)

    def both():
        return torch.autograd.grad(short_convolution(x, weight, bias)[0], (x, weight, bias), dy)

    for what, run in (("forward", forward), ("forward + backward", both)):
        measure = device_milliseconds if device == "cuda" else wall_milliseconds
        yield f"convolution {B},{T},{C} {what}", lambda run=run, measure=measure: measure(run)


def engine_cases(device: str) -> Iterator[tuple[str, Measure]]:
    """Decode steps of the engine, and a prompt."""
    import torch

    from retnet import Engine, LanguageModel, Request, Sampling
    from retnet.models.presets import preset

    for name, slots in (("retnet-125m", 1), ("retnet-125m", 8), ("retnet-tiny", 1)):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            model = LanguageModel(preset(name)).to(dtype).eval()
        engine = Engine(model, num_slots=slots)
        for _ in range(slots):
            engine.submit(Request(list(range(1, 65)), None, Sampling(temperature=0)))
        for _ in range(8):
            engine.step()

        def token(engine=engine) -> float:
            steps = 64 if device == "cuda" else 16
            return timed(lambda: [engine.step() for _ in range(steps)]) / steps

        def prompt(model=model) -> float:
            reader = Engine(model, num_slots=1)
            reader.submit(Request([i % 251 for i in range(1024)], 1, Sampling(temperature=0)))
            return timed(reader.run)

        yield f"{name} step, batch {slots}, token", token
        if slots == 1:
            yield f"{name} prompt of 1024 tokens, wall", prompt


def generate_cases(device: str) -> Iterator[tuple[str, Measure]]:
    """`generate` of the Hugging Face model, per token."""
    import torch

    from retnet.hf import RetNetConfig, RetNetForCausalLM
    from retnet.models.presets import preset

    for name in ("retnet-tiny", "retnet-125m"):
        with torch.device(device):
            model = RetNetForCausalLM(RetNetConfig.of(preset(name))).eval()
        ids = torch.randint(1, 250, (1, 16), device=device)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

        def token(model=model, ids=ids, options=options) -> float:
            new = 32
            one, many = (
                timed(lambda count=count: model.generate(ids, min_new_tokens=count, max_new_tokens=count, **options))
                for count in (1, 1 + new)
            )
            return (many - one) / new

        yield f"generate of transformers, {name}, token", token


def train_cases(device: str) -> Iterator[tuple[str, Measure]]:
    """A training step without the optimizer."""
    import torch

    from retnet import LanguageModel
    from retnet.models.presets import preset

    name, shape = ("retnet-125m", (4, 2048)) if device == "cuda" else ("retnet-tiny", (4, 256))
    with torch.device(device):
        model = LanguageModel(preset(name)).to(torch.bfloat16 if device == "cuda" else torch.float32)
        ids = torch.randint(250, shape)

    def step():
        model.loss(ids, ids).backward()

    yield f"{name} loss and gradients, wall", lambda: wall_milliseconds(step)


CASES = {
    "operator": operator_cases,
    "scan": scan_cases,
    "convolution": convolution_cases,
    "engine": engine_cases,
    "generate": generate_cases,
    "train": train_cases,
}


def timed(run: Callable[[], object]) -> float:
    import torch

    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def wall_milliseconds(run: Callable[[], object], budget: float = 0.5) -> float:
    """The median over calls that take about `budget` seconds in total."""
    first = timed(run)
    return statistics.median(timed(run) for _ in range(max(3, min(400, int(budget * 1e3 / first)))))


def host_milliseconds(run: Callable[[], object], repeats: int = 60) -> float:
    """The shortest time to launch a call, without waiting for the device: other processes only make it longer."""
    import torch

    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    return 1e3 * min(times)


_graphs: dict[int, object] = {}


def device_milliseconds(run: Callable[[], object], repeats: int = 15) -> float:
    """The median of replays of the captured call."""
    import torch

    if id(run) not in _graphs:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        _graphs.clear()  # one at a time: it holds the memory of its results
        _graphs[id(run)] = graph
    graph = _graphs[id(run)]
    graph.replay()  # type: ignore[attr-defined]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()  # type: ignore[attr-defined]
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def serve(device: str, groups: list[str]) -> None:
    """The process of a checkout. It answers each line of input with a measurement; `next` goes to the next case."""
    import torch

    torch.manual_seed(0)
    cases = (case for group in groups for case in CASES[group](device))
    name, measure = next(cases)
    print(json.dumps(name), flush=True)
    for line in sys.stdin:
        if line.strip() == "next":
            name, measure = next(cases, ("", lambda: 0.0))
            print(json.dumps(name), flush=True)
        else:
            print(json.dumps(measure()), flush=True)


class Tree:
    """The process of one checkout, seen from the parent."""

    def __init__(self, path: Path, device: str, groups: str):
        command = [sys.executable, __file__, "--serve", "--device", device, "--cases", groups]
        environment = {**os.environ, "PYTHONPATH": str(path.resolve())}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=path
        )
        self.case = self._answer()

    def _answer(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a checkout's process ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, what: str):
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, help="the old checkout and the new one")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, from: {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.device, options.cases.split(","))
        return
    if len(options.trees) != 2:
        parser.error("give two checkouts")
    old, new = (Tree(path, options.device, options.cases) for path in options.trees)
    print(f"{'case':64s} {'old ms':>10s} {'new ms':>10s} {'new / old':>10s}  (least to most)")
    while old.case:
        assert old.case == new.case, (old.case, new.case)
        for tree in (old, new):
            tree.ask("measure")  # warm up
        pairs = []
        for i in range(options.rounds):
            times = {tree: tree.ask("measure") for tree in ((old, new) if i % 2 else (new, old))}
            pairs.append((times[old], times[new]))
        ratios = sorted(b / a for a, b in pairs)
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{old.case:64s} {a:10.4f} {b:10.4f} {statistics.median(ratios):10.3f}  {spread}", flush=True)
        old.case, new.case = (tree.ask("next") for tree in (old, new))


if __name__ == "__main__":
    main()
