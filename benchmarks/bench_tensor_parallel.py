"""Generation by a model that is split over GPUs, beside one GPU: time per token, and how far logits and tokens agree.

    NCCL_NVLS_ENABLE=0 torchrun --nproc_per_node=2 benchmarks/bench_tensor_parallel.py --model retnet-6.7b
    torchrun --nproc_per_node=2 benchmarks/bench_tensor_parallel.py --size 2 64 4 --device cpu --dtype float32

Every process draws the whole model on its device from one seed, at unit gain so that logits differ, and measures it
alone. Then the same model is split in place and measured again: engines, prompts and steps are the same. Time per token
is the host's median over groups of 32 steps. The floor is the time to read a process's weights once, and to read and
write its states once, at the copy bandwidth of the run. "all-reduces" is the time of the sums of one token alone (two
per layer and one of the embedding, in one CUDA graph on a GPU): what splitting adds.

Agreement: the relative difference of the logits after a prompt, beside that of the same prompt read in chunks on one
GPU, which is rounding alone; and how many greedy tokens are equal before the first that differs. With --train, those of
the loss and the gradients of the prompt, read as a text. NVLink multicast
(NCCL_NVLS_ENABLE) is off unless the environment says otherwise.
"""

import argparse
import gc
import os
import statistics
import time
from dataclasses import replace
from datetime import timedelta

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # read when NCCL starts

import runner
import torch
import torch.distributed as dist
from bench_generate import free, seconds, weight_bytes
from runner import Point, arguments, report
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from retnet.models.config import ModelConfig
from retnet.models.decode.sampling import Sampling
from retnet.models.lm import LanguageModel
from retnet.models.parallel.plan import tensor_parallel_
from retnet.models.parallel.whole import part_of_weights
from retnet.models.presets import preset, retnet_config
from retnet.ops.tensor_shard import TensorShard
from retnet.serve.engine import Engine
from retnet.serve.request import Request

GROUP = 32  # steps per measured group
CPU_COPY_BYTES = 1 << 26


class Bench:
    """One process of the group."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        rank = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cpu" if options.device == "cpu" else f"cuda:{rank}")
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        backend, place = ("nccl", self.device) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, device_id=place, timeout=timedelta(seconds=options.limit))
        self.mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        self.shard = TensorShard.of()
        self.bandwidth = runner.copy_bandwidth() if on_gpu else cpu_bandwidth()
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        if self.shard.rank == 0:
            print(f"[{time.perf_counter() - self.started:5.1f} s] {text}", flush=True)

    def ids(self, config: ModelConfig) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(config.vocab_size, (1, self.options.prompt), generator=generator)

    @torch.no_grad()
    def logits(self, model: LanguageModel, chunk: int) -> Tensor:
        """Of the prompt's last token, read in chunks of so many tokens."""
        state, hidden = None, None
        for ids in self.ids(model.config).to(self.device).split(chunk, 1):
            hidden, state = model.hidden(ids, state, carry=True)
        assert hidden is not None
        return model.logits(hidden[:, -1]).float()

    def gradients(self, model: LanguageModel) -> tuple[float, dict[str, Tensor]]:
        """The loss of the prompt and the gradients of all weights."""
        ids = self.ids(model.config).to(self.device)
        model.train()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.eval()
        return float(loss.detach()), found

    def differences(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str, float]:
        """(relative difference of all gradients as one vector, the weight that differs most, and by how much)."""
        names, rows = sorted(found), []
        for name in names:
            whole = expected[name].double()
            rows.append([float((found[name].double() - whole).square().sum()), float(whole.square().sum())])
        squares = torch.tensor(rows, dtype=torch.float64, device=self.device)
        squares = self.shard.sum_(squares)  # weights that all processes hold count once per process, in both columns
        apart = (squares[:, 0] / squares[:, 1].clamp_min(1e-30)).sqrt()
        total = (squares[:, 0].sum() / squares[:, 1].sum()).sqrt()
        return float(total), names[int(apart.argmax())], float(apart.max())

    def measure(self, model: LanguageModel) -> tuple[float, float, list[int]]:
        """(milliseconds per step, its floor, greedy tokens of the first request)."""
        options, batch = self.options, self.options.batch
        engine = Engine(model, num_slots=batch, max_tokens=options.prompt + options.most)
        engine.warmup()
        prompt, greedy = self.ids(model.config)[0].tolist(), Sampling(temperature=0)
        requests = [Request(prompt, options.most, greedy, ignore_eos=True) for _ in range(batch)]
        generations = [engine.submit(request) for request in requests]
        while not all(generation.num_new for generation in generations):
            engine.step()
        groups, begin = [], time.perf_counter()
        while True:
            groups.append(seconds(lambda: [engine.step() for _ in range(GROUP)]) / GROUP)
            # Process 0's clock and room decide for all.
            left = options.most - generations[0].num_new
            more = left > 2 * GROUP and time.perf_counter() - begin < options.seconds
            if not int(self.shard.first_(torch.tensor(int(more), device=self.device))):
                break
        floor = 1e3 * (weight_bytes(model) + 2 * engine.pool.state.nbytes) / self.bandwidth
        tokens = generations[0].tokens
        return 1e3 * statistics.median(groups), floor, tokens

    def all_reduces(self, model: LanguageModel) -> tuple[float, int]:
        """(milliseconds, number) of the sums of one token."""
        count = 1 + sum(1 if layer.feed_forward is None else 2 for layer in model.config.layers)
        x = torch.zeros(
            self.options.batch, model.config.d_model, dtype=model.embedding.weight.dtype, device=self.device
        )

        def sums() -> None:
            for _ in range(count):
                self.shard.sum_(x)

        if self.device.type == "cpu":
            return 1e3 * statistics.median(seconds(sums) for _ in range(5)), count
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sums()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            sums()
        times = [seconds(graph.replay) for _ in range(50)]  # the same number on every process
        return 1e3 * statistics.median(times[10:]), count


def cpu_bandwidth() -> float:
    source = torch.ones(CPU_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * CPU_COPY_BYTES / min(seconds(lambda: target.copy_(source)) for _ in range(4))


@torch.no_grad()
def drawn(options: argparse.Namespace, device: torch.device) -> LanguageModel:
    """The whole model on a device, its matrices at unit gain."""
    if options.size is None:
        config = preset(options.model)
    else:
        config = retnet_config("small", *options.size, vocab_size=501)
    with torch.device("meta"):
        model = LanguageModel(replace(config, dtype=options.dtype))
    model = model.to_empty(device=device).eval()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):  # norms
            module.reset_parameters()
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    for module in model.modules():
        if hasattr(module, "reset_own"):  # decays and convolutions
            module.reset_own(generator)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def points(bench: Bench):
    options, size = bench.options, bench.shard.size
    model = drawn(options, bench.device)
    case = f"{model.config.name} batch {options.batch}"
    one, all_of_them = ("1 GPU", f"{size} GPUs") if bench.device.type == "cuda" else ("1 process", f"{size} processes")
    bench.say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {size} of {bench.device.type}")
    expected = bench.logits(model, options.prompt)
    rounding = difference(bench.logits(model, max(1, options.prompt // 4)), expected)
    loss, gradients = bench.gradients(model) if options.train else (0.0, {})
    alone, floor, tokens = bench.measure(model)
    free(bench.device)
    note = f"{1e3 * options.batch / alone:.1f} tokens/s"
    yield Point("tensor_parallel", case, one, "token", alone, floor, note=note)
    bench.say("splitting")
    tensor_parallel_(model, bench.mesh)
    free(bench.device)
    apart = difference(bench.logits(model, options.prompt), expected)
    if options.train:
        split_loss, found = bench.gradients(model)
        total, name, most = bench.differences(found, part_of_weights(model, gradients))
        bench.say(
            f"loss {loss:.6f} on {one}, {split_loss:.6f} split; gradients differ by {total:.1e} of their norm, "
            f"at most by {most:.1e} in {name}"
        )
        del gradients, found
        free(bench.device)
    milliseconds, floor, split_tokens = bench.measure(model)
    note = f"{1e3 * options.batch / milliseconds:.1f} tokens/s, {alone / milliseconds:.2f} times {one}"
    yield Point("tensor_parallel", case, all_of_them, "token", milliseconds, floor, note=note)
    sums, count = bench.all_reduces(model)
    note = f"{count} per token, {1e3 * sums / count:.1f} us each; NCCL_NVLS_ENABLE={os.environ['NCCL_NVLS_ENABLE']}"
    yield Point("tensor_parallel", case, all_of_them, "all-reduces", sums, note=note)
    shared = min(len(tokens), len(split_tokens))
    same = next((i for i in range(shared) if tokens[i] != split_tokens[i]), shared)
    bench.say(
        f"logits differ by {apart:.1e} of their norm (by {rounding:.1e} between chunks on {one}); "
        f"the first {same} of {shared} greedy tokens are equal"
    )


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="retnet-6.7b", help="a preset whose heads divide by the number of processes")
    parser.add_argument("--size", type=int, nargs=3, metavar=("LAYERS", "WIDTH", "HEADS"), help="in place of --model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=1, help="1 or a multiple of 4")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--most", type=int, default=2048, help="new tokens at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="of decoding per measurement")
    parser.add_argument("--train", action="store_true", help="compare loss and gradients of the prompt too")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a process waits for another")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    return parser.parse_args()


def main() -> None:
    options = parsed()
    bench = Bench(options)
    measured = points(bench)
    if bench.shard.rank == 0:
        done = report(measured, options.csv)
        print("\n" + runner.table(done))
        print(", ".join(f"{name} {value}" for name, value in runner.certificate().items() if value), flush=True)
    else:
        list(measured)
    del measured
    gc.collect()  # captured steps, which NCCL would wait for
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
