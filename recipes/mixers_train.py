"""Training of many tiny models at once on the same batches.

A step of a tiny model on a GPU is a few hundred kernels of microseconds each, so launches take the time, not
arithmetic. Therefore a whole step (forward, backward, clipping, AdamW) is captured in a CUDA graph, one per batch
shape. Every run replays its graphs on its own stream, so that the runs share the device. On a CPU the same step runs
eagerly. Matrix products are bfloat16 on a GPU (weights and sums float32) and float32 on a CPU.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from retnet import LanguageModel, ModelConfig
from retnet.train.optimizer import scale_by_width

Batch = tuple[Tensor, ...]
Loss = Callable[..., Tensor]  # (model, *batch) -> mean nats

EAGER_STEPS = 3  # before a capture: the first calls compile and allocate
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


@contextmanager
def precision(device: torch.device) -> Iterator[None]:
    # A cached cast inside a graph would keep the weights as they were at capture.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        yield


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    first = max(1, round(warmup * steps))
    if step < first:
        return peak * (step + 1) / first
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - first) / max(1, steps - first)))


@dataclass
class _Captured:
    batch: Batch
    loss: Tensor
    graph: torch.cuda.CUDAGraph


@dataclass
class Run:
    """One model in training. `losses` has the loss of every step, on the device."""

    name: str
    config: ModelConfig
    peak: float
    loss: Loss
    device: torch.device
    graphs: bool = True
    losses: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        with self.device:
            self.model = LanguageModel(self.config)
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None
        self.rate = torch.tensor(self.peak, device=self.device)
        self.optimizer = torch.optim.AdamW(
            _groups(self.model), lr=self.rate, betas=BETAS, fused=True, capturable=self.cuda
        )
        scale_by_width(self.optimizer, self.model)
        self.rates = [(group["lr"], float(group["lr"]) / self.peak) for group in self.optimizer.param_groups]
        self._seen: dict[tuple, int] = {}
        self._captured: dict[tuple, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.cuda else None

    def step(self, batch: Batch, rate: float) -> None:
        """One optimizer step on the run's own stream; the batch comes from the current stream."""
        if self.stream is None:
            self._set_rate(rate)
            self.losses.append(self._train(batch))
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._set_rate(rate)
            self.losses.append(self._train_captured(batch) if self.graphs else self._train(batch))
        for x in batch:
            x.record_stream(self.stream)

    def _set_rate(self, rate: float) -> None:
        for own, factor in self.rates:
            own.fill_(factor * rate)

    def _train(self, batch: Batch) -> Tensor:
        with precision(self.device):
            loss = self.loss(self.model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    def _train_captured(self, batch: Batch) -> Tensor:
        key = tuple(x.shape for x in batch)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= EAGER_STEPS:
            return self._train(batch)
        if key not in self._captured:
            self._captured[key] = self._capture(batch)
        captured = self._captured[key]
        for mine, given in zip(captured.batch, batch, strict=True):
            mine.copy_(given)
        captured.graph.replay()
        return captured.loss.clone()

    def _capture(self, batch: Batch) -> _Captured:
        """Capture the step; capturing does not run it."""
        own, graph = tuple(x.clone() for x in batch), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            loss = self._train(own)
        return _Captured(own, loss, graph)

    def wait(self) -> None:
        """Make the current stream wait for the last step."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def release(self) -> None:
        """Free what only training needs."""
        self._captured.clear()
        del self.optimizer


def train(runs: list[Run], batches: Iterator[Batch], steps: int, report: Callable[[int], None] | None = None) -> None:
    """Every run sees every batch, in the same order."""
    for step in range(steps):
        batch = next(batches)
        for run in runs:
            run.step(batch, learning_rate(step, steps, run.peak))
        if report is not None:
            report(step)
    for run in runs:
        run.wait()
        run.release()


def _groups(model: nn.Module) -> list[dict]:
    """Matrices get weight decay; norms, biases and rates do not."""
    matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and not name.endswith("log_rate")]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
