"""Training on long rows under each recompute level, beside the rate at a length that needs none.

    python benchmarks/bench_long_rows.py [--model retnet-1.3b] [--short 32768] [--long 131072] [--seconds 200]
    python benchmarks/bench_long_rows.py --tiny        a small model on short rows, on any machine

One process and one model: bfloat16 weights drawn on the device, fused AdamW, one row per step, the chunked loss, layers
compiled one by one (--eager: not). The first row of the table is --short without recomputation; the others are --long
under the levels of --levels, "layer" being plain checkpointing of whole layers. A level that does not fit says so, and
no row is begun after --seconds. Peak memory is that of the measured steps, with weights and optimizer.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterator

import torch
from runner import Point, arguments, need_gpu, report
from training import Trained, training_step

from retnet import LanguageModel
from retnet.layers.recompute import Recompute
from retnet.models.activations import activation_bytes, working_bytes
from retnet.models.config import ModelConfig
from retnet.models.presets import preset, retnet_config
from retnet.system.sizes import format_bytes

# In the order of their worth, should time run out. "light" holds too much for 131,072 tokens of 1.3B on one H200.
LEVELS = {
    "medium": Recompute("medium"),
    "layer": Recompute("layer"),
    "layer+offload": Recompute("layer", offload=True),
    "light": Recompute("light"),
}


def build(config: ModelConfig, device: torch.device) -> Trained:
    with device:
        model = LanguageModel(config).bfloat16().train()
    return Trained(model, model.layers, lambda ids: model.hidden(ids)[0], model.head.weight)


def step_seconds(trained: Trained, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds of the first two steps, which compile and allocate, and the median of the others."""
    step = training_step(trained, ids)
    taken = []
    for n in range(2 + steps):
        begin = time.perf_counter()
        step()
        if ids.is_cuda:
            torch.cuda.synchronize()
            if n == 1:
                torch.cuda.reset_peak_memory_stats()
        taken.append(time.perf_counter() - begin)
    trained.model.zero_grad()
    return sum(taken[:2]), statistics.median(taken[2:])


def row(trained: Trained, tokens: int, name: str, recompute: Recompute, options: argparse.Namespace) -> Point:
    """One line of the table; inf milliseconds where memory ended."""
    model = trained.model
    assert isinstance(model, LanguageModel)
    model.recompute = recompute
    device = model.embedding.weight.device
    ids = torch.randint(0, model.config.vocab_size, (1, tokens + 1), device=device)
    held = tokens * (activation_bytes(options.config, recompute.level, autocast=False) * (not recompute.offload))
    held += tokens * working_bytes(options.config, autocast=False) * (recompute.level != "none")
    note = f"recompute={name}, {format_bytes(held)} of activations counted in eager mode"
    try:
        first, seconds = step_seconds(trained, ids, options.steps)
    except torch.OutOfMemoryError:
        return Point("long_rows", f"T={tokens}", name, "step", float("inf"), note=f"does not fit; {note}")
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    note = f"{tokens / seconds:.0f} tokens/s, first two steps {first:.0f} s, {note}"
    return Point("long_rows", f"T={tokens}", name, "step", 1e3 * seconds, extra_bytes=peak, note=note)


def rows(options: argparse.Namespace, begin: float) -> Iterator[Point]:
    trained = build(options.config, options.device)
    if not options.eager:
        trained.compile_layers(dynamic=False)
    short = row(trained, options.short, "none", Recompute(), options)
    yield short
    for name in options.levels:
        if time.perf_counter() - begin > options.seconds:
            print(f"{name}: not begun after {options.seconds:.0f} s", flush=True)
            continue
        long = row(trained, options.long, name, LEVELS[name], options)
        yield long
        rate = short.milliseconds / options.short * options.long / long.milliseconds
        print(f"recompute={name}: {rate:.1%} of the rate of T={options.short} without recomputation", flush=True)


def main() -> None:
    begin = time.perf_counter()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # rows fill most of the memory
    parser = arguments(__doc__, csv="out/bench_long_rows.csv")
    parser.add_argument("--model", default="retnet-1.3b", help="a preset")
    parser.add_argument("--short", type=int, help="tokens of the row without recomputation")
    parser.add_argument("--long", type=int, help="tokens of the other rows")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--steps", type=int, default=3, help="measured steps per row, after two others")
    parser.add_argument("--seconds", type=float, default=200, help="no row is begun later")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--tiny", action="store_true", help="2 layers of width 64 on 256 and 1024 tokens")
    options = parser.parse_args()
    if not options.tiny:
        need_gpu()
    tiny = retnet_config("tiny", 2, 64, 2, vocab_size=257)
    options.config = tiny if options.tiny else preset(options.model)
    options.short = options.short or (256 if options.tiny else 32768)
    options.long = options.long or (1024 if options.tiny else 131072)
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report(rows(options, begin), options.csv)


if __name__ == "__main__":
    main()
