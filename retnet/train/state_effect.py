"""Effect of a learned initial state by position, and the tokens that it lasts.

A layer forgets its initial state as it forgets any token. How much is left of it after n tokens is the derivative of
the layer's state after them by its initial state, because a layer's recurrence is linear in its state. That is measured
on validation documents, so that decays which depend on the token count as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from retnet.data import IGNORED
from retnet.models.states import ModelState
from retnet.ops.decay import window
from retnet.system.files import written_whole
from retnet.train.inputs import RunData
from retnet.train.state_tuning import StateTunedForCausalLM

EFFECT_FILE = "state_effect.json"
ROWS = 64  # of validation, at most
PIECES = 8  # documents on which windows are measured, the longest of the rows
_BLOCK = 1024  # tokens whose logits are in memory at a time
_LEFT = 0.01  # of the initial state, where a window ends


@dataclass(frozen=True)
class Span:
    """Mean validation loss (nats per token) of the tokens at positions first to last, without and with the state."""

    first: int
    last: int
    tokens: int
    without: float
    with_state: float


@dataclass(frozen=True)
class StateEffect:
    """spans: by position, in powers of two. windows: by layer, tokens until 1% of its initial state is left in the
    head (or channel) that keeps it longest; inf: forever. document_tokens: the median length of training documents, or
    of their pieces."""

    spans: list[Span]
    windows: dict[int, float]
    document_tokens: int

    @property
    def faded(self) -> list[int]:
        """The layers whose windows are all shorter than the documents."""
        return [layer for layer, tokens in self.windows.items() if tokens < self.document_tokens]

    def save(self, path: Path) -> None:
        """Write JSON; windows without an end are null."""
        data = asdict(self) | {"windows": {i: None if math.isinf(n) else n for i, n in self.windows.items()}}
        with written_whole(path) as file:
            file.write((json.dumps(data, indent=1) + "\n").encode())

    def show(self, console: Console) -> None:
        """Print the table, and a warning if a layer forgets the state before documents end."""
        table = Table(title="Validation loss by position, nats per token", title_justify="left")
        for name in ("positions", "tokens", "zero state", "learned state", "difference"):
            table.add_column(name, justify="right")
        for span in self.spans:
            places = str(span.first) if span.first == span.last else f"{span.first:,}-{span.last:,}"
            values = (f"{x:.4f}" for x in (span.without, span.with_state))
            table.add_row(places, f"{span.tokens:,}", *values, f"{span.with_state - span.without:+.4f}")
        console.print(table)
        if faded := self.faded:
            longest = ", ".join(f"{layer} ({self.windows[layer]:,.0f})" for layer in faded)
            console.print(
                f"[yellow]warning:[/] every window of these layers is shorter than the documents (median "
                f"{self.document_tokens:,} tokens), so they forget the learned state before a document ends: layer "
                f"{longest}, tokens of its longest window",
                highlight=False,
                soft_wrap=True,
            )


def effect_of_run(packed: StateTunedForCausalLM, data: RunData) -> StateEffect:
    """The effect of a run's learned state on rows spread over its validation data."""
    valid = list(data.valid.values())
    rows = [rows[i] for rows in valid for i in _spread(len(rows), ROWS // len(valid) or 1)]
    lengths = [len(ids) for ids in pieces(data.train.row(i) for i in _spread(len(data.train), ROWS))]
    return state_effect(packed, rows, lengths)


def _spread(size: int, most: int) -> list[int]:
    """At most so many of the numbers below `size`, evenly spread."""
    return sorted({size * i // most for i in range(min(size, most))} if size > most else range(size))


def state_effect(packed: StateTunedForCausalLM, rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> StateEffect:
    """The effect on these validation rows. lengths: tokens of training documents, or of their pieces."""
    packed.eval()
    device = packed.model.embedding.weight.device
    sums = torch.zeros(3, 64, dtype=torch.float64)  # tokens, nats without, nats with; by power of two
    for row in rows:
        sums += _row_sums(packed, {name: x.to(device) for name, x in row.items() if isinstance(x, Tensor)})
    spans = []
    for place, (count, without, with_state) in enumerate(sums.T.tolist()):
        if count:
            first, last = (0, 0) if place == 0 else (2 ** (place - 1), 2**place - 1)
            spans.append(Span(first, last, int(count), without / count, with_state / count))
    median = sorted(lengths)[len(lengths) // 2] if lengths else 0
    longest = sorted(pieces(rows), key=len, reverse=True)[:PIECES]
    return StateEffect(spans, longest_windows(packed, longest, device), median)


def longest_windows(
    packed: StateTunedForCausalLM, documents: Iterable[Tensor], device: torch.device
) -> dict[int, float]:
    """By layer: tokens until 1% of the initial state is left, in the part of it that lasts longest."""
    totals: dict[int, list[Tensor]] = {}
    num_tokens = 0
    for ids in documents:
        num_tokens += len(ids)
        for layer, logs in _log_survival(packed, ids.to(device)).items():
            before = totals.get(layer)
            totals[layer] = logs if before is None else [a + b for a, b in zip(before, logs, strict=True)]
    return {
        layer: float(window(max(float(total.max()) for total in logs) / num_tokens, _LEFT))
        for layer, logs in totals.items()
    }


def _log_survival(packed: StateTunedForCausalLM, ids: Tensor) -> dict[int, list[Tensor]]:
    """By layer, the logarithm of the share of each part of the initial state that is left after a document [T]."""
    model, fields = packed.model, packed.initial.fields
    with torch.enable_grad():
        start = packed.initial(model, 1)
        begun, leaves = list(start.layers), {}
        for i, names in enumerate(fields):
            own = begun[i].tensors()
            leaves[i] = {name: own[name].detach().clone().requires_grad_() for name in names}
            begun[i] = begun[i].replaced(leaves[i])
        _, after = model.hidden(ids[None], ModelState(tuple(begun)), carry=True)
        assert after is not None
        tiny = torch.finfo(torch.float32).tiny
        found: dict[int, list[Tensor]] = {}
        for i, leaf in leaves.items():
            for name, before in leaf.items():
                total = after.layers[i].tensors()[name].double().sum()
                (slope,) = torch.autograd.grad(total, before, retain_graph=True, materialize_grads=True)
                found.setdefault(i, []).append(slope.double().clamp(tiny, 1).log().cpu())
    return found


@torch.no_grad()
def _row_sums(packed: StateTunedForCausalLM, row: dict[str, Tensor]) -> Tensor:
    """[3, 64]: tokens, nats without and nats with the state, by the power of two of the position."""
    model, ids, positions, targets = packed.model, row["input_ids"], row["position_ids"], row["shift_labels"]
    bounds = _bounds(row)
    kept = targets != IGNORED
    places = torch.where(positions == 0, 0, positions.clamp_min(1).double().log2().floor().long() + 1)[kept]
    sums = [torch.bincount(places, minlength=64).double()]
    for state in (None, packed.initial(model, len(bounds) - 1)):
        hidden, _ = model.hidden(ids[None], state, cu_seqlens=bounds)
        nats = torch.cat([
            F.cross_entropy(model.logits(h).float(), t, ignore_index=IGNORED, reduction="none")
            for h, t in zip(hidden[0].split(_BLOCK), targets.split(_BLOCK), strict=True)
        ])  # fmt: skip
        sums.append(torch.bincount(places, nats[kept].double(), minlength=64))
    return torch.stack(sums).cpu()


def _bounds(row: dict[str, Tensor]) -> Tensor:
    """Bounds [N + 1] of the documents of a row."""
    starts = (row["position_ids"] == 0).nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([len(row["position_ids"])])])


def pieces(rows: Iterable[dict[str, Any]]) -> list[Tensor]:
    """Every document, or piece of one, in these rows, each [T]; without what fills rows up."""
    return [
        row["input_ids"][begin:end]
        for row in rows
        for begin, end in pairwise(_bounds(row).tolist())
        if bool((row["shift_labels"][begin:end] != IGNORED).any())
    ]
