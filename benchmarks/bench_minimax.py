"""A MiniMax of 9B parameters: converted in bounded memory, and decoding after a long context beside transformers.

    python benchmarks/bench_minimax.py                        9B parameters, 1,048,576 tokens, one GPU of 80 GiB or more
    python benchmarks/bench_minimax.py --stages write,convert
    python benchmarks/bench_minimax.py --stages ours,theirs --context 131072
    python benchmarks/bench_minimax.py --tiny                 a small shape on a CPU

The shape is that of MiniMax-Text-01, narrower: 7 layers of lightning attention to one of softmax attention with 8
shared heads of keys, 8 experts of which a token uses 2. Weights are random and written by transformers as safetensors
(`write`), the conversion runs in a process of its own (`convert`), and both models decode greedily from the same
weights (`ours`, `theirs`). No prompt is read: caches and states are filled with the same random values, and positions
start at `context`. So times hold for any text, and the tokens mean nothing.

`step` is the time per token of one sequence; `extra_bytes` the peak of device memory with weights and caches (on a CPU:
their sizes), and for `convert` the peak of the process's memory, mapped pages of
the read files included. The floor is the time to read the weights that a token
uses, the caches and the states once, at the copy bandwidth of the same run. transformers' cache has no room in advance:
each step copies it. Its lightning layers keep their state in the model's dtype, ours in float32.
"""

import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from runner import Point, arguments, copy_bandwidth, report
from torch import Tensor

from retnet.layers.attention import AttentionState
from retnet.layers.retention import RetentionState
from retnet.layers.state import TokenCache
from retnet.models.cost import parameter_counts
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_model
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from retnet.system.sizes import format_bytes

NINE_BILLION = {
    "vocab_size": 200064, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 1536, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
TINY = {
    "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
SOFTMAX_EVERY = 8
SCALES = {"alpha": 3.5565588200778455, "beta": 1.0}  # of MiniMax-Text-01's residuals
STAGES = ("write", "convert", "ours", "theirs")
# getrusage would count the memory of this process, from which it is started.
CONVERT = """
import sys
from retnet.models.convert import convert
convert(*sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
FIRST = 1  # the token that both models read first, at position `context`


class Bench:
    def __init__(self, options: Namespace):
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.theirs, self.ours, self.facts = (options.folder / x for x in ("theirs", "ours", "logits.pt"))

    def point(self, implementation: str, what: str, milliseconds: float, size: float, **more: Any) -> Point:
        case = f"{'tiny' if self.options.tiny else '9B'} {self.options.context} {self.options.dtype}"
        return Point("minimax", case, implementation, what, milliseconds, extra_bytes=size, **more)

    def peak(self, *held: int) -> int:
        """The peak of device memory; on a CPU the sizes of what is held."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else sum(held)


def write(bench: Bench) -> Iterator[Point]:
    """A random model of transformers, as it saves one."""
    shape = TINY if bench.options.tiny else NINE_BILLION
    is_softmax = [(i + 1) % SOFTMAX_EVERY == 0 for i in range(shape["num_hidden_layers"])]
    kinds = ["full_attention" if softmax else "linear_attention" for softmax in is_softmax]
    scales = {f"{x}_{name}_factor": size for x in ("full_attn", "linear_attn", "mlp") for name, size in SCALES.items()}
    config = transformers.MiniMaxConfig(**shape, **scales, layer_types=kinds, bos_token_id=1, eos_token_id=2)
    begin = time.perf_counter()
    torch.manual_seed(0)
    with bench.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=bench.dtype)
    size = sum(x.nbytes for x in model.parameters())
    model.save_pretrained(bench.theirs, max_shard_size="4GB")
    yield bench.point("transformers", "write", 1e3 * (time.perf_counter() - begin), size)


def convert(bench: Bench) -> Iterator[Point]:
    command = [sys.executable, "-c", CONVERT, str(bench.theirs), str(bench.ours)]
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    taken = 1e3 * (time.perf_counter() - begin)
    peak = 1024 * int(done.stdout.split()[-2])
    written = sum(file.stat().st_size for file in bench.ours.glob("*.safetensors"))
    yield bench.point("ours", "convert", taken, peak, note=f"{format_bytes(written)} of weights")


@torch.no_grad()
def ours(bench: Bench) -> Iterator[Point]:
    """The model called directly, and the engine, which replays one captured graph per token on a GPU."""
    context, steps = bench.options.context, bench.options.steps
    begin = time.perf_counter()
    model = load_model(bench.ours, device=bench.device)
    yield bench.point("ours", "load", 1e3 * (time.perf_counter() - begin), bench.peak(0))
    engine = Engine(model, num_slots=1, max_tokens=context + 2 * steps + 16)
    generation = engine.submit(Request([FIRST, FIRST], 2 * steps, Sampling(temperature=0), ignore_eos=True))
    while not generation.tokens:
        engine.step()
    state = engine.pool.state
    fill(state, context)
    ids = torch.full((1, 1), FIRST, device=bench.device)
    torch.save(model(ids, state, carry=True, in_place=True).logits[0, 0].float().cpu(), bench.facts)
    weights, held = sum(x.nbytes for x in model.parameters()), state.nbytes
    floor = None
    if bench.device.type == "cuda":
        counts = parameter_counts(model.config)
        read = counts["total"] - idle(model) - model.embedding.weight.numel()
        floor = 1e3 * (read * bench.dtype.itemsize + held) / (copy_bandwidth() / 2)
    more: dict[str, Any] = {"floor_milliseconds": floor, "note": f"{format_bytes(held)} of caches and states"}
    taken = per_token(bench, lambda: model(ids, state, carry=True, in_place=True))
    yield bench.point("ours, model", "step", taken, bench.peak(weights, held), **more)
    fill(state, context)
    taken = per_token(bench, engine.step)
    yield bench.point("ours, engine", "step", taken, bench.peak(weights, held), **more)


@torch.no_grad()
def theirs(bench: Bench) -> Iterator[Point]:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    context = bench.options.context
    model = transformers.AutoModelForCausalLM.from_pretrained(bench.theirs, dtype=bench.dtype).to(bench.device).eval()
    c, cache = model.config, MiniMaxCache()
    for i, kind in enumerate(c.layer_types):
        if kind == "full_attention":
            entries = random(i, 2, c.num_key_value_heads, context, c.head_dim, like=model.lm_head.weight)
            cache.update(entries[:1], entries[1:], i)
        else:
            shape = 1, c.num_attention_heads, c.head_dim, c.head_dim
            cache.set_linear_cache(i, random(i, *shape, like=model.lm_head.weight))
    ids, position = torch.full((1, 1), FIRST, device=bench.device), [context]

    def step() -> Tensor:
        place = torch.tensor([position], device=bench.device)
        position[0] += 1
        return model(ids, past_key_values=cache, position_ids=place, use_cache=True).logits

    found = step()[0, 0].float().cpu()
    note = f"transformers {transformers.__version__}"
    if bench.facts.is_file():
        expected = torch.load(bench.facts)
        difference = ((found - expected).norm() / expected.norm()).item()
        note += f"; logits differ from ours by {difference:.1e}, the best token is {int(found.argmax())} and "
        note += f"{int(expected.argmax())}"
    held = sum(x.nbytes for layer in cache.layers if layer.is_initialized for x in (layer.keys, layer.values))
    held += sum(x.nbytes for x in cache.linear_cache if isinstance(x, Tensor))
    weights = sum(x.nbytes for x in model.parameters())
    taken = per_token(bench, step)
    yield bench.point("transformers", "step", taken, bench.peak(weights, held), note=note)


def random(seed: int, *shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


def fill(state: ModelState, context: int) -> None:
    """Overwrite the state of one sequence with random values at position `context`."""
    for i, layer in enumerate(chain.from_iterable(part.leaves for part in state.parts)):
        layer.position.fill_(context)
        if isinstance(layer, AttentionState):
            G, K = layer.keys.shape[2:]
            entries = random(i, 2, G, context, K, like=layer.keys).transpose(1, 2)
            layer.keys[0, :context], layer.values[0, :context] = entries[0], entries[1]
        else:
            assert isinstance(layer, RetentionState)
            like = layer.memory.new_empty(0, dtype=next(x.keys.dtype for x in state if isinstance(x, AttentionState)))
            layer.memory.copy_(random(i, *layer.memory.shape, like=like))
        if isinstance(layer, TokenCache):
            layer.filled = context


def idle(model: LanguageModel) -> int:
    """Weights that a token does not use."""
    fed = (layer.feed_forward for layer in model.config.layers)
    return sum(config.idle_parameters(model.config.d_model) for config in fed if config is not None)


def per_token(bench: Bench, step: Callable[[], object]) -> float:
    """The median milliseconds of a step that is waited for, after two to warm up."""
    times = []
    for _ in range(bench.options.steps - 2):
        begin = time.perf_counter()
        step()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def parsed() -> Namespace:
    parser = arguments(__doc__, csv="out/bench_minimax.csv")
    parser.add_argument("--folder", type=Path, default=Path("out/minimax"), help="of both models (36 GiB)")
    parser.add_argument("--stages", default=",".join(STAGES), help=", ".join(STAGES))
    parser.add_argument("--context", type=int)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tiny", action="store_true", help="a small shape")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.context = options.context or (512 if options.tiny else 1 << 20)
    options.dtype = options.dtype or ("float32" if options.tiny else "bfloat16")
    unknown = set(options.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"--stages has {', '.join(sorted(unknown))}; accepted: {', '.join(STAGES)}")
    return options


def main() -> None:
    options = parsed()
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    run = {"write": write, "convert": convert, "ours": ours, "theirs": theirs}
    for stage in options.stages.split(","):
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for point in run[stage](bench):
            report([point], options.csv)


if __name__ == "__main__":
    main()
