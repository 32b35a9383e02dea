"""Speculative decoding on a CPU, one stream: accepted draft tokens, tokens per step, processor time per token.

    python benchmarks/bench_speculation.py out/model input.txt

The model has multi-token prediction. Prompts are cut from the last tenth of the text, which training should not have
read. Draft tokens come from the context, and from the modules. Output is compared with that of plain decoding. Time is
that of the processor, so other processes disturb it less than the clock's.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from retnet import LanguageModel, load, load_tokenizer
from retnet.models.decode.sampling import Sampling
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation


@dataclass(frozen=True)
class Measured:
    """Of all prompts: their outputs, draft tokens, steps after the first, tokens of these steps, processor seconds."""

    outputs: list[list[int]]
    drafted: int
    accepted: int
    steps: int
    tokens: int
    seconds: float


def measure(model: LanguageModel, requests: list[Request], speculation: Speculation | None) -> Measured:
    """Requests one after another, on one slot."""
    engine = Engine(model, num_slots=1, max_tokens=4096, speculation=speculation)
    outputs, steps, tokens, seconds = [], 0, 0, 0.0
    for request in requests:
        generation = engine.submit(request)
        while not generation.num_new:
            engine.step()
        begin, first, done = time.process_time(), generation.num_new, engine.stats().steps
        engine.run()
        seconds += time.process_time() - begin
        steps, tokens = steps + engine.stats().steps - done, tokens + generation.num_new - first
        outputs.append(generation.tokens)
    stats = engine.stats()
    return Measured(outputs, stats.drafted, stats.accepted, steps, tokens, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="saved directory")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=300, help="new tokens per prompt")
    parser.add_argument("--prompt", type=int, default=200, help="characters per prompt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model, "cpu"), load_tokenizer(args.model)
    text = args.text.read_text()
    starts = [len(text) * 9 // 10 + n * len(text) // (11 * args.prompts) for n in range(args.prompts)]
    prompts = [tokenizer.encode(text[start : start + args.prompt], start=True) for start in starts]
    ways = [Speculation(n, source=source) for source in ("context", "mtp") for n in args.draft_tokens]
    print("| temperature | draft tokens | accepted | tokens per step | ms per step | ms per token |")
    print("|---|---|---|---|---|---|")
    for temperature in args.temperatures:
        sampling = Sampling(temperature=temperature, seed=1)
        requests = [Request(prompt, args.tokens, sampling, ignore_eos=True) for prompt in prompts]
        plain = measure(model, requests, None)
        for way in (None, *ways):
            found = plain if way is None else measure(model, requests, way)
            name = "none" if way is None else f"{way.draft_tokens}, {way.source}"
            share = f"{found.accepted / found.drafted:.0%}" if found.drafted else ""
            different = "" if found.outputs == plain.outputs else " (other tokens, from rounding)"
            print(
                f"| {temperature:g} | {name}{different} | {share} | {found.tokens / found.steps:.2f} "
                f"| {1e3 * found.seconds / found.steps:.2f} | {1e3 * found.seconds / found.tokens:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
