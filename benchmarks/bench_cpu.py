"""Speed of retention on a CPU: share of the matrix rate, time against length, training step; attention, a Llama.

    python benchmarks/bench_cpu.py [rate] [scaling] [train] [--csv FILE]

The floor of a `rate` point counts only the operations of the recurrence: 4 K V per token and head forward, 12 K V with
the backward. It assumes the rate of a 2048^3 float32 matrix product, measured in turns with the operator. The work
inside chunks, C (K + V), is not counted.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from rivals import llama_config
from runner import Point, arguments, median_milliseconds, report

from retnet import LanguageModel, retention
from retnet.models.presets import preset
from retnet.ops.decay import paper_log_decay

RATE_CASES = ((1, 16384, 8, 128, 256), (1, 8192, 8, 256, 512))
SCALING_TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 65536)
SCALING_ROUNDS = 9
ATTENTION_TOKENS = 8192  # the longest; beyond it, attention takes minutes


def seconds_beside_products(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """(median seconds of a call, median operations per second of a 2048^3 product), measured in turns.

    The speed of a shared machine changes from second to second, so only neighbours in time are comparable.
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


def rate_points() -> Iterator[Point]:
    """Forward, and forward + backward, against the rate of matrix products."""
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
            yield Point("cpu", f"{B},{T},{H},{K},{V}", "ours", what, 1e3 * seconds, 1e3 * count / rate, note=note)


def scaling_points() -> Iterator[Point]:
    """8 heads of (128, 256), as wide as 8 attention heads of 128; all lengths in turns, medians over rounds."""
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
    for (T, name), took in seconds.items():
        middle = statistics.median(took)
        yield Point("cpu", f"T={T}", name, "forward", 1e3 * middle, note=f"{1e6 * middle / T:.2f} us per token")


def train_points() -> Iterator[Point]:
    """A training step (forward, backward, AdamW) of retnet-tiny and of a Llama of its size, 8 x 1024 bytes."""
    from transformers import LlamaForCausalLM

    config = preset("retnet-tiny")
    ours = LanguageModel(config)
    wanted = sum(p.numel() for p in ours.parameters())
    layers, width = len(config.layers), config.d_model
    hidden = round((wanted - config.vocab_size * width - layers * 4 * width**2) / (3 * layers * width))
    shape = {"layers": layers, "width": width, "heads": 4, "feed_forward": hidden, "vocab": config.vocab_size}
    llama = LlamaForCausalLM(llama_config(**shape, max_tokens=1024, tie_word_embeddings=True))
    ids = torch.randint(0, config.vocab_size, (8, 1025))
    losses = {
        "retnet-tiny": (ours, lambda: ours.loss(ids[:, :-1], ids[:, 1:])),
        "llama": (llama, lambda: llama(ids[:, :-1], labels=ids[:, :-1]).loss),
    }
    for name, (model, loss) in losses.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        seconds = 1e-3 * median_milliseconds(step)
        count = sum(p.numel() for p in model.parameters())
        note = f"{8 * 1024 / seconds:.0f} tokens/s, {count} parameters"
        yield Point("cpu", "train 8x1024", name, "step", 1e3 * seconds, note=note)


def main() -> None:
    sections = {"rate": rate_points, "scaling": scaling_points, "train": train_points}
    parser = arguments(__doc__)
    parser.add_argument("sections", nargs="*", metavar="|".join(sections), help="sections to run (default: all)")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(sections):
        parser.error(f"no section {', '.join(sorted(unknown))}; accepted: {', '.join(sections)}")
    torch.manual_seed(0)
    for name in options.sections or sections:
        report(sections[name](), options.csv)


if __name__ == "__main__":
    main()
