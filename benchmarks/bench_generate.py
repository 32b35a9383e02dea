"""Generation by the engine: time a token against position and batch, time to the first token, memory of a slot.

    python benchmarks/bench_generate.py --model retnet-125m --batch 1 4 --prompt 64 1024 --threads 2

Weights are random: a preset's shapes are what is measured. The floor of a step is its weights read once and the states
of all slots read and written once, over the copy bandwidth measured in the same run. A position is reached by reading
as many prompt tokens in blocks. Memory a slot is what the engine says, and what its tensors hold: it does not depend on
the position.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from runner import Point, append, table

from retnet.models.lm import LanguageModel
from retnet.models.presets import preset
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from retnet.serve.sampling import Sampling

WARM_UP_STEPS = 3
COPY_BYTES = 1 << 28  # several times the caches of any CPU so far


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of the best of several copies far larger than the cache."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(_seconds(lambda: target.copy_(source), device) for _ in range(8))


def model_of(name: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    with torch.device(device):
        return LanguageModel(preset(name)).to(dtype).eval()


def step_floor(model: LanguageModel, engine: Engine, bandwidth: float) -> float:
    """Milliseconds: weights once (of a tied embedding the head's reading), states in and out."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return 1e3 * (weights + 2 * engine.pool.state.nbytes) / bandwidth


def measure(model: LanguageModel, name: str, batch: int, prompt: int, steps: int, bandwidth: float) -> list[Point]:
    """The time to the first token of one prompt, and then of a step with `batch` such requests."""
    engine = Engine(model, num_slots=batch, prompt_block=256, prompt_budget=256 * 64)
    engine.warmup()
    ids = torch.randint(model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    endless = Request(ids, None, Sampling(temperature=0), ignore_eos=True)
    device = engine.pool.state.position.device
    first = engine.submit(endless)
    begin = time.perf_counter()
    while not first.tokens:
        engine.step()
    to_first = time.perf_counter() - begin
    others = [engine.submit(endless) for _ in range(batch - 1)]
    while any(not other.tokens for other in others):
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()
    milliseconds = 1e3 * statistics.median(_seconds(engine.step, device) for _ in range(steps))
    state = engine.pool.state.nbytes / batch / 2**20
    case = f"{name} batch {batch} at {prompt}"
    rate = f"{1e3 * batch / milliseconds:.1f} tokens/s"
    return [
        Point(
            "generate", case, "engine", "first token", 1e3 * to_first, note=f"{prompt / to_first:.0f} prompt tokens/s"
        ),
        Point(
            "generate",
            case,
            "engine",
            "step",
            milliseconds,
            step_floor(model, engine, bandwidth),
            extra_mebibytes=state,
            note=f"a slot's state; {rate}; copies at {bandwidth / 1e9:.1f} GB/s",
        ),
    ]


def _seconds(run, device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="retnet-125m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=Path("out/bench_generate.csv"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = model_of(options.model, device, getattr(torch, options.dtype))
    bandwidth = copy_bandwidth(device)
    for batch in options.batch:
        for prompt in options.prompt:
            points = measure(model, options.model, batch, prompt, options.steps, bandwidth)
            print(table(points), flush=True)
            append(options.csv, points)


if __name__ == "__main__":
    main()
