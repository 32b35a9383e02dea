"""Retention on the CPU: its share of the machine's matrix rate, its scaling in T, attention and Llama beside it.

    python benchmarks/bench_cpu.py [rate] [scaling] [train] [--csv FILE]

The floor of a `rate` point counts the recurrence's operations alone, 4 K V a token and head forward and 12 K V with the
backward, at the rate of a 2048^3 float32 matrix product measured by turns with it. What chunks cost on top, C (K + V),
counts as loss.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from runner import Point, append, median_milliseconds, table

from retnet import LanguageModel, retention
from retnet.models.presets import preset
from retnet.ops.decay import paper_log_decay

RATE_CASES = ((1, 16384, 8, 128, 256), (1, 8192, 8, 256, 512))
SCALING_TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 65536)
SCALING_ROUNDS = 9
ATTENTION_TOKENS = 8192  # longest; beyond it attention takes minutes


def seconds_beside_products(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """(median seconds of a call, median rate in operations a second of a 2048^3 product), measured by turns.

    A shared machine changes its speed from second to second: only neighbours in time compare.
    """
    a, b, c = (torch.randn(2048, 2048) for _ in range(3))
    seconds, rates = [], []
    for _ in range(rounds + 1):
        for work, into in ((run, seconds), (lambda: torch.mm(a, b, out=c), rates)):
            start = time.perf_counter()
            work()
            into.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), 2 * 2048**3 / statistics.median(rates[1:])


def forward_and_backward(run: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dout: torch.Tensor) -> Callable:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(run(*leaves), leaves, dout)


def rate_points() -> list[Point]:
    points = []
    for B, T, H, K, V in RATE_CASES:
        inputs = [torch.randn(B, T, H, D) for D in (K, K, V)]
        log_decay = paper_log_decay(H)

        def run(q, k, v, log_decay=log_decay):
            return retention(q, k, v, log_decay, mode="chunkwise", return_state=False)[0]

        operations = 4 * K * V * B * T * H
        both = forward_and_backward(run, inputs, torch.randn(B, T, H, V))
        for what, call, count in (
            ("forward", lambda run=run, inputs=inputs: run(*inputs), operations),
            ("forward+backward", both, 3 * operations),
        ):
            with torch.set_grad_enabled(what != "forward"):
                seconds, rate = seconds_beside_products(call, rounds=11)
            note = f"matrix product at {rate / 1e9:.0f} GFLOP/s"
            points.append(
                Point("cpu", f"{B},{T},{H},{K},{V}", "ours", what, 1e3 * seconds, 1e3 * count / rate, note=note)
            )
            print(table(points[-1:]), flush=True)
    return points


def scaling_points() -> list[Point]:
    """8 heads of (128, 256), the width of 8 attention heads of 128; all lengths by turns, medians of the rounds."""
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    for T in SCALING_TOKENS:
        q, k, v = (torch.randn(1, T, 8, D) for D in (128, 128, 256))
        calls[T, "ours"] = partial(retention, q, k, v, paper_log_decay(8), return_state=False)
        if T <= ATTENTION_TOKENS:
            a, b, c = (torch.randn(1, 8, T, 128) for _ in range(3))
            calls[T, "attention"] = partial(F.scaled_dot_product_attention, a, b, c, is_causal=True)
    seconds: dict[tuple[int, str], list[float]] = {case: [] for case in calls}
    with torch.no_grad():
        for _ in range(SCALING_ROUNDS):
            for case, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[case].append(time.perf_counter() - start)
    points = []
    for (T, name), took in seconds.items():
        middle = statistics.median(took)
        points.append(Point("cpu", f"T={T}", name, "forward", 1e3 * middle, note=f"{1e6 * middle / T:.2f} us a token"))
        print(table(points[-1:]), flush=True)
    return points


def train_points() -> list[Point]:
    """A training step (forward, backward, AdamW) of retnet-tiny and of a Llama of its size, 8 x 1024 bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = preset("retnet-tiny")
    ours = LanguageModel(config)
    wanted = sum(p.numel() for p in ours.parameters())
    layers, width = len(config.layers), config.d_model
    hidden = round((wanted - config.vocab_size * width - layers * 4 * width**2) / (3 * layers * width))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
        )
    )
    ids = torch.randint(0, config.vocab_size, (8, 1025))
    losses = {
        "retnet-tiny": (ours, lambda: ours.loss(ids[:, :-1], ids[:, 1:])),
        "llama": (llama, lambda: llama(ids[:, :-1], labels=ids[:, :-1]).loss),
    }
    points = []
    for name, (model, loss) in losses.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        seconds = 1e-3 * median_milliseconds(step)
        count = sum(p.numel() for p in model.parameters())
        note = f"{8 * 1024 / seconds:.0f} tokens/s, {count} parameters"
        points.append(Point("cpu", "train 8x1024", name, "step", 1e3 * seconds, note=note))
        print(table(points[-1:]), flush=True)
    return points


def main() -> None:
    sections = {"rate": rate_points, "scaling": scaling_points, "train": train_points}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="|".join(sections), help="all if none is named")
    parser.add_argument("--csv", type=Path, default=None)
    options = parser.parse_args()
    if unknown := set(options.sections) - set(sections):
        parser.error(f"no section {', '.join(sorted(unknown))}; accepted: {', '.join(sections)}")
    torch.manual_seed(0)
    points = [point for name in options.sections or sections for point in sections[name]()]
    if options.csv:
        append(options.csv, points)


if __name__ == "__main__":
    main()
