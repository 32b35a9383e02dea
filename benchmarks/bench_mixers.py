"""Comparison of mixers, and of stacks of mixers, in one run.

    python benchmarks/bench_mixers.py mixer [--csv FILE]       the recurrence of a Mamba layer: ours, FLA's, mamba-ssm;
                                                               on a CPU also whole layers and transformers' slow path
    python benchmarks/bench_mixers.py stack [--only NAME ...]  a training step of the tri-mixer `arch_expert_research`
                                                               (1.53B), a pure RetNet and a Llama of the same size

On a GPU everything is bfloat16, and `stack` uses fused AdamW. Mamba-2's recurrence is retention with queries and keys
shared by all heads. flash-linear-attention needs them per head, so "fla" copies them, as its Mamba-2 would; "per head"
compares the operators alone, both with queries and keys per head. Implementations that are not installed are left out,
with a message.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from rivals import llama_config
from runner import (
    Point,
    arguments,
    device_milliseconds,
    extra_bytes,
    failed,
    fla_installed,
    floor_milliseconds,
    installed,
    median_milliseconds,
    report,
)
from torch import Tensor, nn
from training import Trained, llama, measured, ours

from retnet import ModelConfig, retention
from retnet.layers.mamba1 import Mamba1, Mamba1Config
from retnet.layers.mamba2 import Mamba2, Mamba2Config
from retnet.layers.token_layout import TokenLayout
from retnet.models.cost import parameter_counts
from retnet.ops.selective_scan import selective_scan
from retnet.stack.resolve import resolve_config

MAMBA2_CASES = ((4, 8192, 32, 128, 64), (1, 32768, 32, 128, 64))  # B, T, heads, state width, head width
MAMBA1_CASES = ((1, 8192, 1536, 16), (4, 8192, 1536, 16))  # B, T, D, state width
CPU_MAMBA2 = (1, 1024, 768)  # B, T, width of the model
CPU_MAMBA1 = (1, 128, 768)  # transformers' backward is quadratic in T: 5 s here, minutes at 1024
CHUNK = 64  # tokens per chunk in the floor's count of operations
COMPILED_SCAN = importlib.util.find_spec("selective_scan_cuda") is not None  # mamba-ssm's extension


# --- one mixer on a GPU ---


@torch.compile(dynamic=False)
def scaled_by_step(x: Tensor, step: Tensor) -> Tensor:
    """x [B, T, H, V] times its time steps [B, T, H], compiled to one kernel per direction; mamba-ssm fuses it."""
    return x * step[..., None].to(x.dtype)


def mamba2_forms(H: int) -> dict[str, tuple[bool, Callable[..., Tensor]]]:
    """Implementation -> (queries and keys per head?, (C, B, x, step) -> out), for rates of -1."""

    def ours(q, k, x, step):
        return retention(q, k, scaled_by_step(x, step), -step, scale=1.0, return_state=False)[0]

    forms: dict[str, tuple[bool, Callable[..., Tensor]]] = {"ours": (False, ours), "ours per head": (True, ours)}
    if fla_installed():
        from fla.ops.simple_gla import chunk_simple_gla

        def fla(q, k, x, step):
            q, k = (z.expand(-1, -1, x.shape[2], -1).contiguous() if z.shape[2] == 1 else z for z in (q, k))
            return chunk_simple_gla(q, k, scaled_by_step(x, step), -step, scale=1.0)[0]

        forms |= {"fla": (False, fla), "fla per head": (True, fla)}
    if installed("mamba_ssm", "mamba-ssm"):
        if not COMPILED_SCAN:  # the import needs Mamba-1's extension, which Mamba-2 does not call
            sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        rates = -torch.ones(H, device="cuda")

        def mamba_ssm(q, k, x, step):
            return mamba_chunk_scan_combined(x, step, rates, k, q, chunk_size=256)

        forms["mamba-ssm"] = (False, mamba_ssm)
    return forms


def mamba2_points(only: Sequence[str] | None, B: int, T: int, H: int, K: int, V: int) -> Iterator[Point]:
    for name, (per_head, form) in mamba2_forms(H).items():
        if only is not None and name not in only:
            continue
        G = H if per_head else 1
        generator = torch.Generator("cuda").manual_seed(0)
        draw = partial(torch.randn, generator=generator, device="cuda", dtype=torch.bfloat16)
        q, k, x = draw(B, T, G, K), draw(B, T, G, K) * K**-0.5, draw(B, T, H, V)
        step = 0.1 * torch.rand(B, T, H, generator=generator, device="cuda")
        floors = [_mamba2_floor(B * T, G, H, K, V, backward) for backward in (False, True)]
        yield from _timed("mamba2", f"mamba2 {B},{T},{H},{K},{V}", name, form, [q, k, x, step], floors)


def _mamba2_floor(tokens: int, G: int, H: int, K: int, V: int, backward: bool) -> float:
    """Operations as for retention; queries and keys are moved once per group, time steps in float32."""
    operations = H * (CHUNK * (K + V) + 4 * K * V)
    moved = 2 * (2 * G * K + 2 * H * V) + 4 * H
    if backward:
        operations += H * (CHUNK * (3 * K + 2 * V) + 10 * K * V)
        moved += 2 * (4 * G * K + 3 * H * V) + 8 * H
    return floor_milliseconds(tokens * operations, tokens * moved)


def mamba1_points(only: Sequence[str] | None, B: int, T: int, D: int, N: int) -> Iterator[Point]:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, generator=generator, device="cuda")
    x, write, read = draw(B, T, D).bfloat16(), draw(B, T, N).bfloat16(), draw(B, T, N).bfloat16()
    step, rate = F.softplus(draw(B, T, D) - 4), -torch.arange(1, N + 1, device="cuda").expand(D, N).float()
    forms: dict[str, Callable[..., Tensor]] = {"ours": lambda *z: selective_scan(*z)[0]}
    if importlib.util.find_spec("mamba_ssm") and COMPILED_SCAN:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def mamba_ssm(x, step, rate, write, read):
            turned = [z.transpose(1, 2) for z in (x, step.to(x.dtype), write, read)]
            return selective_scan_fn(turned[0], turned[1], rate, *turned[2:]).transpose(1, 2)

        forms["mamba-ssm"] = mamba_ssm
    # Forward: read x, step, write and read, write y. Backward: read them and dy, write their gradients.
    moved = [B * T * (2 * D + 4 * D + 2 * 2 * N + 2 * D)]
    moved.append(2 * moved[0] + B * T * (2 * D + 4 * D + 2 * 2 * N))
    floors = [floor_milliseconds(0, count) for count in moved]
    tensors = [x, step, rate.contiguous(), write, read]
    for name, form in forms.items():
        if only is None or name in only:
            yield from _timed("mamba1", f"mamba1 {B},{T},{D},{N}", name, form, tensors, floors)


def _timed(
    bench: str, case: str, name: str, form: Callable, tensors: list[Tensor], floors: list[float]
) -> Iterator[Point]:
    """Forward, and forward + backward with its peak memory."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    dout = torch.randn_like(tensors[2] if bench == "mamba2" else tensors[0])

    def forward():
        with torch.no_grad():
            return form(*leaves)

    def both():
        return torch.autograd.grad(form(*leaves), leaves, dout)

    for what, run, floor in (("forward", forward, floors[0]), ("forward+backward", both, floors[1])):
        try:
            run()
            memory = extra_bytes(run, sum(x.nbytes for x in leaves)) if run is both else None
            device, host = device_milliseconds(run)
            yield Point(bench, case, name, what, device, floor, host, extra_bytes=memory)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            yield failed(bench, case, name, what, error)
        torch.cuda.empty_cache()


# --- on a CPU: the recurrence of Mamba-2, and whole layers ---


def cpu_scan_points() -> Iterator[Point]:
    """The recurrence of Mamba-2 and transformers' slow path for it, on the same float32 inputs."""
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        print("this version of transformers has no separate function for the scan: left out")
        return
    B, T, D = CPU_MAMBA2
    H, K, V = 2 * D // 64, 128, 64
    x, step, rate = torch.randn(B, T, H, V), 0.1 * torch.rand(B, T, H), -1 - 15 * torch.rand(H)
    write, read = torch.randn(B, T, 1, K), torch.randn(B, T, 1, K)

    def ours(x, step, rate, write, read):
        return retention(read, write, x * step[..., None], rate * step, scale=1.0, return_state=False)[0]

    def theirs(x, step, rate, write, read):
        return mamba2_chunk_scan(x, step, rate, write, read, chunk_size=256)

    dout = torch.randn(B, T, H, V)
    for name, form in {"ours": ours, "transformers": theirs}.items():
        leaves = [z.clone().requires_grad_() for z in (x, step, rate, write, read)]
        with torch.no_grad():
            forward = median_milliseconds(lambda form=form, leaves=leaves: form(*leaves))
        both = median_milliseconds(lambda form=form, leaves=leaves: torch.autograd.grad(form(*leaves), leaves, dout))
        yield from _pair("mamba2 scan", f"{B},{T},{H},{K},{V}", name, forward, both)


def cpu_points() -> Iterator[Point]:
    """Forward and backward of a layer in float32; transformers runs its slow path on a CPU."""
    for name, (B, T, D), layers in (("mamba2", CPU_MAMBA2, _mamba2_layers), ("mamba1", CPU_MAMBA1, _mamba1_layers)):
        ours, theirs = layers(D)
        x, layout = torch.randn(B, T, D), TokenLayout.of((B, T), torch.device("cpu"))
        runs = {"ours": lambda y, ours=ours, layout=layout: ours(y, None, layout)[0], "transformers": theirs}
        for implementation, run in runs.items():
            input = x.clone().requires_grad_()
            with torch.no_grad():
                forward = median_milliseconds(lambda run=run, x=x: run(x))
            both = median_milliseconds(lambda run=run, input=input: run(input).sum().backward())
            yield from _pair(f"{name} layer", f"{B},{T},{D}", implementation, forward, both)


def _pair(bench: str, case: str, name: str, forward: float, both: float) -> list[Point]:
    return [
        Point(bench, f"{bench} {case}", name, what, milliseconds)
        for what, milliseconds in (("forward", forward), ("forward+backward", both))
    ]


def _mamba2_layers(D: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import Mamba2Config as Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    theirs = Mamba2Mixer(
        Config(hidden_size=D, num_heads=2 * D // 64, head_dim=64, state_size=128, n_groups=1, expand=2), layer_idx=0
    )
    return Mamba2(Mamba2Config(2 * D), D), theirs


def _mamba1_layers(D: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import MambaConfig as Config
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return Mamba1(Mamba1Config(2 * D, D // 16), D), MambaMixer(Config(hidden_size=D), layer_idx=0)


# --- training stacks of 1.5B ---

WIDTH_STEP = 128  # of feed-forward widths, so that tensor cores are full


def stack_configs() -> dict[str, ModelConfig]:
    """The preset, and a stack of its retention layer alone with as many parameters."""
    tri_mixer = replace(resolve_config("arch_expert_research"), gradient_checkpointing=False)
    target = parameter_counts(tri_mixer)["total"]
    layer = next(layer for layer in tri_mixer.layers if layer.mixer.kind == "retention")

    def pure(width: int) -> ModelConfig:
        block = replace(layer, feed_forward=replace(layer.feed_forward, hidden_dim=width))
        return replace(tri_mixer, layers=(block,) * len(tri_mixer.layers))

    width = _matching_width(lambda width: parameter_counts(pure(width))["total"], target)
    return {"tri-mixer": tri_mixer, "retnet": pure(width)}


def _matching_width(parameters: Callable[[int], int], target: int) -> int:
    """The feed-forward width whose parameter count, which is linear in the width, is nearest to the target."""
    one, two = parameters(WIDTH_STEP), parameters(2 * WIDTH_STEP)
    return WIDTH_STEP * (1 + round((target - one) / (two - one)))


def llama_like(like: ModelConfig) -> Trained:
    """transformers' Llama of the same width, depth, heads, vocabulary and parameter count."""
    from transformers import LlamaForCausalLM

    shape = {"layers": len(like.layers), "width": like.d_model, "heads": 16, "num_key_value_heads": 4}
    shape |= {"vocab": like.vocab_size, "max_tokens": 32768, "tie_word_embeddings": True}

    def parameters(feed_forward: int) -> int:
        with torch.device("meta"):
            model = LlamaForCausalLM(llama_config(feed_forward=feed_forward, **shape))
        return sum(p.numel() for p in model.parameters())

    return llama(feed_forward=_matching_width(parameters, parameter_counts(like)["total"]), **shape)


def stack_points(name: str, batch: int, tokens: int, compile: bool) -> Iterator[Point]:
    torch.cuda.empty_cache()  # memory of the previous stack
    configs = stack_configs()
    trained = llama_like(configs["tri-mixer"]) if name == "llama" else ours(configs[name])
    if compile:
        trained.compile_layers()
    ids = torch.randint(0, configs["tri-mixer"].vocab_size, (batch, tokens + 1), device="cuda")
    yield measured("stack", name, trained, ids, note="compiled" if compile else "eager", budget=3.0)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=["mixer", "stack"])
    parser.add_argument("--only", nargs="+", choices=["tri-mixer", "retnet", "llama"], help="stacks to measure")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="mixers to measure on a GPU")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile the stacks' layers")
    options = parser.parse_args()
    torch.manual_seed(0)
    measures: list[Callable[[], Iterator[Point]]]
    if options.what == "stack":
        names = options.only or ("tri-mixer", "retnet", "llama")
        measures = [partial(stack_points, name, options.batch, options.tokens, not options.eager) for name in names]
    elif not torch.cuda.is_available():
        measures = [cpu_scan_points, cpu_points]
    else:
        measures = [partial(mamba2_points, options.implementations, *case) for case in MAMBA2_CASES]
        measures += [partial(mamba1_points, options.implementations, *case) for case in MAMBA1_CASES]
    for measure in measures:
        report(measure(), options.csv)


if __name__ == "__main__":
    main()
