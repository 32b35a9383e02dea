"""Rows of a million tokens against rows of 2048: one model, continued both ways from the same weights.

    retnet data ... out/tokens/books-train (and books-valid, books-test; see docs/do/train.md)
    python recipes/quality.py pack --train out/tokens/books-train --valid out/tokens/books-valid
        --test out/tokens/books-test --books out/tokens/books-valid --to out/packed-books          (one line)
    torchrun --nproc_per_node=2 recipes/long_rows.py --books out/packed-books [--text out/packed] --out out/long-rows
    torchrun --nproc_per_node=2 recipes/long_rows.py --tiny --out out/tiny                         CPU, a minute

1. The model is trained on rows of 2048 tokens (of --text, or of the books): retention whose decays depend on the token
   and start slow, with a short convolution.
2. From there it is continued twice, on the same books in the same order, with as many tokens per step: "long" on rows
   of 1,048,576 tokens that all processes share (context parallelism), "short" on the same text cut into rows of 2048.
3. Both and their start are measured on whole books that none was trained on, read from the first token to the last:
   loss by position and behind the borders of shards, and recall of planted pairs (`long_rows_task.py`) by distance,
   also across borders. "long, no exchange" is the long model without the exchange of states.

All models are measured with the shards of all processes. The results are one JSON file and a table. A step is timed
before a phase begins, and the phase has as many steps as fit into its seconds; "short" has as many as "long".
"""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from long_rows_task import KEYS, VALUES, plant
from mixers_train import precision
from quality_data import batches, load, source_bytes
from quality_measure import measuring
from quality_run import facts
from quality_stacks import SHAPES, stack
from quality_train import CLIP, learning_rate, optimizer_of
from torch import Tensor, nn

from retnet import LanguageModel
from retnet.layers.recompute import Recompute
from retnet.layers.retention import MultiScaleRetention
from retnet.ops import context_parallel
from retnet.ops.context_shard import ContextShard

MARKS = KEYS + VALUES
LOGIT_ROWS = 8192


@dataclass(frozen=True)
class Sizes:
    """long, short: tokens per row. short_batch: rows per step of phase 1. seconds: of phase 1, and of each
    continuation. recall_rows: of the long length."""

    long: int = 1 << 20
    short: int = 2048
    short_batch: int = 64
    start_steps: int = 400
    steps: int = 40
    start_seconds: float = 100.0
    seconds: float = 90.0
    recall_rows: int = 2


TINY = Sizes(1024, 256, 4, 4, 2, 20.0, 20.0, 1)


class Session:
    """One process, and what all of them do together."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.begin = options, time.monotonic()
        self.cuda = torch.cuda.is_available() and not options.tiny
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.sizes = TINY if options.tiny else Sizes()
        if options.long is not None:
            self.sizes = replace(self.sizes, long=options.long)
        cpu = torch.device("cpu")
        self.books = source_bytes(cpu) if options.tiny else load(options.books, cpu)
        self.text = self.books if options.text is None else load(options.text, cpu, options.tokens)
        shape = SHAPES["tiny" if options.tiny else options.shape]
        used = max(self.books.vocab_size, self.text.vocab_size)
        vocab = max(shape.vocab_size, -(-(used + MARKS) // 64) * 64)
        self.first_key = vocab - MARKS
        self.config = replace(stack(options.stack, replace(shape, vocab_size=vocab)), seed=0)
        self.results: dict = facts(self.device, options.commit) | {"stack": options.stack, "processes": self.size}
        self.results["sizes"] = {"long": self.sizes.long, "short": self.sizes.short}

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"{time.monotonic() - self.begin:5.0f} s  {text}", flush=True)

    def highest(self, value: float) -> float:
        found = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def summed(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def mine(self, length: int) -> slice:
        """This process's part of `length` tokens or rows."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    # Data. Every process draws the same rows, and uses its part of them.

    def short_rows(self) -> Iterator[Tensor]:
        """Of phase 1: rows [short_batch, short + 1] of this process."""
        generator = torch.Generator().manual_seed(1)
        for rows in batches(self.text.train.rows(self.sizes.short), self.sizes.short_batch):
            planted = plant(rows, self.first_key, generator).tokens
            yield planted[self.mine(len(planted))].to(self.device)

    def long_text(self) -> Iterator[Tensor]:
        """Text [long + 1] of the books for training, joined in another random order every time."""
        books, generator, length = self.books.train, torch.Generator().manual_seed(2), self.sizes.long
        waiting = torch.empty(0, dtype=torch.long)
        while True:
            while len(waiting) <= length:
                order = torch.randperm(len(books.ends), generator=generator).tolist()
                waiting = torch.cat([waiting, *(books.document(index).long() for index in order)])
            yield waiting[: length + 1]
            waiting = waiting[length:]

    def rows_of(self, kind: str) -> Iterator[tuple[Tensor, ContextShard | None]]:
        """Of a continuation: rows of this process with their targets, and its shard where a row is shared."""
        generator, long, short = torch.Generator().manual_seed(3), self.sizes.long, self.sizes.short
        for text in self.long_text():
            if kind == "long":
                tokens, mine = plant(text[None], self.first_key, generator).tokens, self.mine(long)
                yield tokens[:, mine.start : mine.stop + 1].to(self.device), ContextShard.of(long)
            else:
                cut = text.unfold(0, short + 1, short)
                tokens = plant(cut, self.first_key, generator).tokens
                yield tokens[self.mine(len(tokens))].to(self.device), None

    # Training.

    def start(self) -> LanguageModel:
        with self.device:
            model = LanguageModel(self.config)
        slow_heads_(model, self.sizes.long)
        return model

    def train(
        self, model: LanguageModel, rows: Iterator[tuple[Tensor, ContextShard | None]], name: str, rate: float,
        steps: int | None, most: int, seconds: float,
    ) -> int:  # fmt: skip
        """Train for `steps`, or for as many of `most` as fit into the seconds. Returns how many."""
        model.train()
        if self.cuda and not self.options.eager:
            for layer in model.layers:
                layer.compile(dynamic=False)
        optimizer = optimizer_of(model, self.options.optimizer)
        times = []
        for _ in range(3):  # compiles; these gradients are not used, and the rows come again
            batch = next(rows)
            begin = time.monotonic()
            self.backward(model, *batch)
            if self.cuda:
                torch.cuda.synchronize()
            times.append(self.highest(time.monotonic() - begin))
            model.zero_grad(set_to_none=True)
        steps = steps or max(1, min(most, int(seconds / (1.05 * min(times)))))
        self.say(f"{name}: {steps} steps of about {min(times):.2f} s, the first {times[0]:.0f} s")
        losses, begin = [], time.monotonic()
        for step in range(steps):
            losses.append(self.backward(model, *next(rows)))
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, rate)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if (step + 1) % max(1, steps // 5) == 0:
                recent = torch.stack(losses[-max(1, steps // 5) :]).mean().item()
                self.say(f"{name} {step + 1}: {recent:.3f} nats per token")
        spent = self.highest(time.monotonic() - begin)
        peak = self.highest(torch.cuda.max_memory_allocated() if self.cuda else 0.0)
        self.results[name] = {"steps": steps, "seconds": spent, "peak_bytes": peak, "rate": rate,
                              "recompute": model.recompute.level,
                              "losses": torch.stack(losses).tolist()}  # fmt: skip
        return steps

    def backward(self, model: LanguageModel, rows: Tensor, shard: ContextShard | None) -> Tensor:
        """The loss of a step over all processes, whose gradients are summed."""
        with precision(self.device):
            loss = model.loss(rows[:, :-1], rows[:, 1:], context=shard)
        if shard is None:
            loss = loss / self.size
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.summed(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return self.summed(loss.detach().clone())

    # Measurements, on rows that all processes share.

    def nats(self, model: LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each target of this process's part of a row [T + 1], and whether it was the most likely token."""
        length = len(tokens) - 1
        mine = self.mine(length)
        part = tokens[mine.start : mine.stop + 1].to(self.device)
        hidden = model.hidden(part[None, :-1], context=ContextShard.of(length))[0][0]
        losses, right = [], []
        for states, targets in zip(hidden.split(LOGIT_ROWS), part[1:].split(LOGIT_ROWS), strict=True):
            logits = model.logits(states).float()
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            right.append(logits.argmax(-1) == targets)
        return torch.cat(losses), torch.cat(right)

    def held_out(self) -> list[Tensor]:
        """Whole books for measurements, cut to a multiple of the number of processes."""
        books = [stream.document(i) for stream in (self.books.valid, self.books.test) for i in range(len(stream.ends))]
        books = [book.long()[: (len(book) - 1) // self.size * self.size + 1] for book in books]
        least = 8 * self.sizes.short
        most = 2 if self.options.tiny else self.options.most_books
        return sorted((book for book in books if len(book) > least), key=len)[-most:]

    def by_position(self, model: LanguageModel) -> list[dict]:
        """Mean nats of held-out books at positions up to 1024, 2048, ... of a book, and behind borders of shards."""
        edges = [0, *(2**n for n in range(int(math.log2(self.sizes.short)) - 1, 40))]
        totals = torch.zeros(len(edges), 2, dtype=torch.float64, device=self.device)
        limits = torch.tensor(edges[1:], device=self.device)
        behind = self.sizes.short // 2
        for book in self.held_out():
            nats, _ = self.nats(model, book)
            places = torch.arange(len(nats), device=self.device) + self.mine(len(book) - 1).start
            bucket = torch.searchsorted(limits, places, right=True)
            totals[:, 0].index_add_(0, bucket, nats.double())
            totals[:, 1].index_add_(0, bucket, torch.ones_like(nats, dtype=torch.float64))
            if self.rank:  # the last bucket, of 2^39 tokens and more, has none
                totals[-1] += torch.stack([nats[:behind].double().sum(), nats.new_tensor(len(nats[:behind])).double()])
        found = self.summed(totals).tolist()
        names = [*(f"{edge:,}" for edge in edges[1:]), f"{behind:,} behind a border"]
        rows = zip(names, found, strict=True)
        return [{"up_to": name, "nats": total / count, "tokens": int(count)} for name, (total, count) in rows if count]

    def recall(self, model: LanguageModel) -> list[dict]:
        """Loss and accuracy of planted values, by distance and by whether a border lies between."""
        text = torch.cat([self.books.valid.tokens, self.books.test.tokens]).long()
        length = min(self.sizes.long, (len(text) - 1) // self.size * self.size)
        generator, part = torch.Generator().manual_seed(4), length // self.size
        edges = [self.sizes.short, *(4**n * self.sizes.short for n in range(1, 12) if 4**n * self.sizes.short < length)]
        edges = torch.tensor([*edges, length])
        totals = torch.zeros(2, len(edges), 3, dtype=torch.float64, device=self.device)
        for _ in range(self.sizes.recall_rows):
            planted = plant(text[None, : length + 1], self.first_key, generator)
            nats, right = self.nats(model, planted.tokens[0])
            targets = planted.asked - 1  # the target of a token is the next one
            crosses = (targets // part != (targets - planted.distances) // part).long()
            bucket = torch.bucketize(planted.distances, edges)
            own = targets // part == self.rank
            here = (targets[own] - self.rank * part).to(self.device)
            facts = torch.stack([nats[here].double(), right[here].double(), torch.ones_like(nats[here]).double()], 1)
            index = (crosses[own].to(self.device), bucket[own].to(self.device))
            totals.index_put_(index, facts, accumulate=True)
        found, rows = self.summed(totals).tolist(), []
        for crossed, by_distance in zip((False, True), found, strict=True):
            for edge, (total, hits, count) in zip(edges.tolist(), by_distance, strict=True):
                if count:
                    row = {"across": crossed, "up_to": edge, "nats": total / count, "accuracy": hits / count}
                    rows.append(row | {"pairs": int(count)})
        return rows

    def measure(self, name: str, model: LanguageModel, exchange: bool = True) -> None:
        begin = time.monotonic()
        with measuring(model), nullcontext() if exchange else without_exchange():
            found = {"positions": self.by_position(model), "recall": self.recall(model)}
        self.results.setdefault("measured", {})[name] = found
        self.say(f"{name} measured in {time.monotonic() - begin:.0f} s")
        self.save()

    def save(self) -> None:
        if self.rank == 0:
            self.options.out.mkdir(parents=True, exist_ok=True)
            (self.options.out / "results.json").write_text(json.dumps(self.results))

    def work(self) -> None:
        sizes, model = self.sizes, self.start()
        shared = ((rows, None) for rows in self.short_rows())
        self.train(model, shared, "start", self.options.rate, None, sizes.start_steps, sizes.start_seconds)
        weights = copy.deepcopy(model.state_dict())
        self.measure("start", model)
        steps = None
        for kind in ("long", "short"):
            del model
            torch._dynamo.reset()
            model = self.start()
            model.load_state_dict(weights)
            model.recompute = Recompute("layer")
            rate = self.options.rate * self.options.continued
            steps = self.train(model, self.rows_of(kind), kind, rate, steps, sizes.steps, sizes.seconds)
            self.measure(kind, model)
            if kind == "long":
                self.measure("long, no exchange", model, exchange=False)
        self.results["wall_seconds"] = time.monotonic() - self.begin
        self.save()
        self.say("\n" + table(self.results) if self.rank == 0 else "")


@torch.no_grad()
def slow_heads_(model: LanguageModel, longest: int) -> None:
    """Decays that depend on the token start at half-lives from 32 tokens to a quarter of the longest row."""
    for module in model.modules():
        if isinstance(module, MultiScaleRetention) and module.decay_proj is not None:
            heads = module.decay_proj.out_features
            if module.decay_proj.bias is None:
                raise ValueError("decays have no bias; accepted: a stack with gated_start, such as gated-conv+start")
            lives = torch.logspace(5, max(6.0, math.log2(longest / 4)), heads, base=2.0, dtype=torch.float64)
            gamma = torch.exp(-math.log(2) / lives)
            module.decay_proj.bias.copy_(torch.logit(gamma ** (1 / module.GATE_POWER)))


def without_exchange() -> AbstractContextManager[object]:
    """Every shard of retention starts from an empty state."""

    def nothing(shard: ContextShard, states: Tensor, totals: Tensor) -> Tensor:
        return torch.zeros_like(states[0])

    return patch.object(context_parallel, "from_before", nothing)


def table(results: dict) -> str:
    """Two Markdown tables: loss by position in a book, and recall by distance."""
    measured = results["measured"]
    names = list(measured)
    lines = [f"| position in the book, up to | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for n, row in enumerate(measured[names[0]]["positions"]):
        losses = " | ".join(f"{measured[name]['positions'][n]['nats']:.3f}" for name in names)
        lines.append(f"| {row['up_to']} | {losses} |")
    lines += ["", f"| recall at a distance up to | pairs | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for n, row in enumerate(measured[names[0]]["recall"]):
        cells = [measured[name]["recall"][n] for name in names]
        shown = " | ".join(f"{cell['accuracy']:.1%} ({cell['nats']:.2f})" for cell in cells)
        where = "across a border" if row["across"] else "on one process"
        lines.append(f"| {row['up_to']:,}, {where} | {row['pairs']:,} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, default=Path("out/packed-books"), help="streams of whole books")
    parser.add_argument("--text", type=Path, default=None, help="streams for phase 1 (default: the books)")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="of --text, at most")
    parser.add_argument("--out", type=Path, default=Path("out/long-rows"))
    parser.add_argument("--stack", default="gated-conv+start", help="of quality_stacks.py, with a start of its decays")
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--optimizer", default="muon", choices=("adamw", "muon"))
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate of phase 1")
    parser.add_argument("--continued", type=float, default=0.5, help="of it, the peak of the continuations")
    parser.add_argument("--long", type=int, default=None, help="tokens of a long row (default: 1,048,576)")
    parser.add_argument("--most-books", type=int, default=6, help="held-out books to measure, the longest ones")
    parser.add_argument("--eager", action="store_true", help="do not compile blocks")
    parser.add_argument("--tiny", action="store_true", help="a small model of bytes on CPUs")
    parser.add_argument("--commit", default=None, help="recorded in the results (default: git's)")
    options = parser.parse_args()
    cuda = torch.cuda.is_available() and not options.tiny
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    Session(options).work()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
