"""Muon for hidden matrices and AdamW for everything else, in one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum M of a matrix by the nearest matrix with
singular values near 1, found by a Newton-Schulz iteration. Here it is torch.optim.Muon with
`adjust_lr_fn="match_rms_adamw"` (arXiv 2502.16982): a matrix of A rows and B columns moves by lr 0.2 sqrt(max(A, B))
times that matrix, so its entries move by about as much as under AdamW, and one learning rate serves both algorithms.

Matrices of equal shape are orthogonalised together, so a step is a few batched products. Two kinds of weights are
several matrices each: the experts of a mixture, and projections that are several maps (`weight_parts` of a layer).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from retnet.layers.moe import ExpertLinear
from retnet.layers.weight_roles import named_roles, parts_of_products
from retnet.models.mup import Rates
from retnet.ops.dtypes import wide_dtype
from retnet.train.optimizer import decayed_parameters
from retnet.train.parameter_patterns import Patterns, algorithm_of

Coefficients = tuple[float, float, float]
COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon: the slope at 0 is as large as it can be
STABILIZING: Coefficients = (2.0, -1.5, 0.5)  # singular values near 1 come closer to it
NORM_EPS = 1e-7
_BATCH_ELEMENTS = 2**27  # of the matrices that are orthogonalised together: bounds the memory for copies


class Muon(Optimizer):
    """Groups with `algorithm` "muon" (matrices [out, in], or experts [E, out, in]) or "adamw".

    Args:
        params: parameters, or groups such as those of `muon_groups`. A group of Muon may have `parts`: the rows of each
            map in its matrices, and `part_rates`: the factor of the rate of each; weight decay is divided by it.
        lr, weight_decay: of both algorithms; the decay is decoupled.
        momentum, nesterov, ns_steps: of Muon.
        ns_coefs: of the polynomial of a step. stabilize_steps, stabilize_coefs: of steps after those, as DeepSeek-V4
            takes after 8 of the others.
        betas, eps: of AdamW.
        ns_dtype: of the Newton-Schulz iteration; bfloat16 on a GPU and float32 on a CPU if None.
        process_group: processes that hold the same gradients, or shards of them; they share the orthogonalisation.

    Raises ValueError for a number out of range, and for a parameter that its group's algorithm does not take.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
        ns_coefs: Coefficients = COEFFICIENTS,
        stabilize_steps: int = 0,
        stabilize_coefs: Coefficients = STABILIZING,
    ):
        self.ns_dtype, self.process_group = ns_dtype, process_group
        check_iteration(ns_steps, stabilize_steps, ns_coefs=ns_coefs, stabilize_coefs=stabilize_coefs)
        self.ns_coefs, self.stabilizing = ns_coefs, (stabilize_coefs,) * stabilize_steps
        defaults = {
            "algorithm": "muon", "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_steps": ns_steps, "parts": None, "betas": tuple(betas), "eps": eps, "fused": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches: defaultdict[_Kind, list[_Change]] = defaultdict(list)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "adamw":
                self._adamw(group, params)
                continue
            for change in self._changes(group, params):
                batches[_kind(group, change)].append(change)
        for kind, changes in batches.items():
            for batch in _bounded(changes):
                self._apply(kind, batch)
        return loss

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **zeros}
        states = [self.state[p] for p in params]
        exp_avgs, exp_avg_sqs, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        adamw(
            params,
            [cast(Tensor, p.grad) for p in params],
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _changes(self, group: dict[str, Any], params: list[Tensor]) -> Iterator[_Change]:
        """Advance the momentum; the matrices to orthogonalise and what they will change."""
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(cast(Tensor, p.grad))}
        grads = [_local(cast(Tensor, p.grad)) for p in params]
        momenta = [_local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
        for p, update in zip(params, updates, strict=True):
            changes = list(_matrices(p, update, group["parts"], self._dtype(update)))
            for change, rate in zip(changes, group.get("part_rates", (1.0,) * len(changes)), strict=True):
                change.rate = rate
            yield from changes

    def _dtype(self, update: Tensor) -> torch.dtype:
        if self.ns_dtype is not None:
            return self.ns_dtype
        return wide_dtype(update.dtype) if update.device.type == "cpu" else torch.bfloat16

    def _apply(self, kind: _Kind, changes: list[_Change]) -> None:
        wholes = torch.cat([change.whole for change in changes]).to(self._dtype(changes[0].whole))
        iteration = (*(self.ns_coefs,) * kind.ns_steps, *self.stabilizing)
        if self.process_group is None or not kind.is_shared:
            directions = orthogonalize(wholes, iteration)
        else:
            directions = _shared(wholes, iteration, self.process_group)
        directions = directions.to(kind.dtype).split([len(change.whole) for change in changes])
        moved = [(change, d) for change, d in zip(changes, directions, strict=True) if change.weight.numel()]
        if not moved:
            return
        weights, moves = [change.weight for change, _ in moved], [d[change.region] for change, d in moved]
        _move(weights, moves, 1 - kind.lr * kind.weight_decay, 0.2 * kind.lr * math.sqrt(max(kind.shape)))


def _move(weights: list[Tensor], directions: list[Tensor], kept: float, rate: float) -> None:
    """weight <- kept weight - rate direction."""
    if weights[0].device.type == "cpu":  # where the list operations round `kept` to bfloat16 with the weights
        for weight, direction in zip(weights, directions, strict=True):
            weight.mul_(kept).add_(direction, alpha=-rate)
    else:
        torch._foreach_mul_(weights, kept)
        torch._foreach_add_(weights, directions, alpha=-rate)


class _Kind(NamedTuple):
    """Changes with equal values are computed together."""

    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    is_shared: bool
    lr: float
    weight_decay: float
    ns_steps: int


def _kind(group: dict[str, Any], change: _Change) -> _Kind:
    shape, weight = tuple(change.whole.shape[1:]), change.weight
    options = float(group["lr"]) * change.rate, group["weight_decay"] / change.rate, group["ns_steps"]
    return _Kind(shape, weight.device, weight.dtype, change.is_shared, *options)


@dataclass
class _Change:
    """whole [n, A, B]: matrices to orthogonalise. weight: the view of a parameter that whole[region] changes.

    is_shared: all processes of the group have these matrices; not if each holds experts of its own. rate: factor of the
    group's.
    """

    whole: Tensor
    weight: Tensor
    region: tuple[slice, ...]
    is_shared: bool
    rate: float = 1.0


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _matrices(p: Tensor, update: Tensor, parts: tuple[int, ...] | None, dtype: torch.dtype) -> Iterator[_Change]:
    """update: what this process holds of p's. A sharded matrix is gathered, in the dtype of the iteration."""
    weight, starts, is_shared = _local(p), (0,) * p.ndim, True
    if isinstance(p, DTensor):
        placements = p.placements
        whole_experts = p.ndim == 3 and all(x.is_replicate() or x.is_shard(0) for x in placements)
        if whole_experts:
            is_shared = False
        else:
            _, starts = compute_local_shape_and_global_offset(p.shape, p.device_mesh, placements)
            shape = {"shape": p.shape, "stride": p.stride()}
            update = DTensor.from_local(update.to(dtype), p.device_mesh, placements, **shape).full_tensor()
    if p.ndim == 2:
        weight, update, starts = weight[None], update[None], (0, *starts)
    first = 0
    for rows in parts or update.shape[1:2]:
        top = max(first, starts[1])
        bottom = max(top, min(first + rows, starts[1] + weight.shape[1]))
        region = (
            slice(starts[0], starts[0] + weight.shape[0]),
            slice(top - first, bottom - first),
            slice(starts[2], starts[2] + weight.shape[2]),
        )
        yield _Change(
            update[:, first : first + rows], weight[:, top - starts[1] : bottom - starts[1]], region, is_shared
        )
        first += rows


def _bounded(changes: list[_Change]) -> Iterator[list[_Change]]:
    """Batches of at most `_BATCH_ELEMENTS`, or of one change."""
    batch: list[_Change] = []
    size = 0
    for change in changes:
        if batch and size + change.whole.numel() > _BATCH_ELEMENTS:
            yield batch
            batch, size = [], 0
        batch.append(change)
        size += change.whole.numel()
    yield batch


def orthogonalize(x: Tensor, iteration: int | Sequence[Coefficients]) -> Tensor:
    """[N, A, B] -> matrices with the same singular vectors, and singular values between about 0.7 and 1.2.

    iteration: the coefficients (a, b, c) of each step, x <- a x + (b x x^T + c (x x^T)^2) x; a number of steps means so
    many of `COEFFICIENTS`. Singular values far below the largest (by 1e-3 after 5 steps) stay smaller; a matrix of
    zeros stays one.
    """
    if isinstance(iteration, int):
        iteration = (COEFFICIENTS,) * iteration
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=NORM_EPS)
    is_tall = x.shape[-2] > x.shape[-1]
    for a, b, c in iteration:
        gram = x.mT @ x if is_tall else x @ x.mT
        change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, change) if is_tall else (change, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x


def _shared(x: Tensor, iteration: Sequence[Coefficients], processes: dist.ProcessGroup) -> Tensor:
    """`orthogonalize` of matrices that every process has, each process doing its share."""
    world, rank = dist.get_world_size(processes), dist.get_rank(processes)
    share = math.ceil(len(x) / world)
    own = x[rank * share : (rank + 1) * share]
    done = x.new_zeros(share, *x.shape[1:])
    done[: len(own)] = orthogonalize(own, iteration)
    out = x.new_empty(world * share, *x.shape[1:])
    dist.all_gather(list(out.split(share)), done, group=processes)
    return out[: len(x)]


def check_iteration(ns_steps: int, stabilize_steps: int = 0, **coefficients: Sequence[float]) -> None:
    """Raise ValueError for numbers of steps out of range, and for coefficients that are not three finite numbers."""
    for name, steps, least in (("ns_steps", ns_steps, 1), ("stabilize_steps", stabilize_steps, 0)):
        if not least <= steps < 100:
            raise ValueError(f"{name} is {steps}; accepted: {least} to 99")
    for name, values in coefficients.items():
        if len(values) != 3 or not all(math.isfinite(x) for x in values):
            raise ValueError(f"{name} is {values}; accepted: three finite numbers")


def _check_group(group: dict[str, Any]) -> None:
    if group["algorithm"] not in ("muon", "adamw"):
        raise ValueError(f"algorithm is {group['algorithm']!r}; accepted: muon, adamw")
    for name in ("lr", "weight_decay", "eps"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} is {group[name]}; accepted: 0 or more")
    for name, values in (("momentum", (group["momentum"],)), ("betas", group["betas"])):
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"{name} is {group[name]}; accepted: 0 or more, and below 1")
    check_iteration(group["ns_steps"])
    for p in group["params"] if group["algorithm"] == "muon" else ():
        parts = group["parts"]
        if p.ndim not in (2, 3) or not p.is_floating_point():
            raise ValueError(
                f"a parameter of Muon has shape {tuple(p.shape)} and dtype {p.dtype}; accepted: real matrices, or "
                'stacks of them; others belong in a group with algorithm "adamw"'
            )
        if parts is not None and (min(parts) < 1 or sum(parts) != p.shape[-2]):
            raise ValueError(f"parts is {parts} of a matrix with {p.shape[-2]} rows; accepted: parts that sum to them")


def muon_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.1,
    adamw_lr_multiplier: float = 1.0,
    patterns: Patterns | None = None,
) -> list[dict[str, Any]]:
    """The parameters of a model that are trained, as groups for `Muon`.

    Muon gets the linear maps that their layer names in WEIGHT_ROLES, as a role other than an embedding's. Maps without
    a name (decay projections, routers, gates of branches, time steps, Hyena's filters, adapters), weights between
    residual streams, embeddings, the head, convolutions and vectors go to AdamW, with `adamw_lr_multiplier` times the
    rate. Weight decay as in `decayed_parameters`.
    patterns: exceptions by name, as in `parameter_patterns.py`; Muon takes matrices alone, embeddings included.
    Rates and decays of a model with muP are those of `retnet.models.mup`.
    """
    rates = Rates(model)
    roles, parts_of = named_roles(model), parts_of_products(model)
    matrices = {
        id(module.weight): module
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Embedding, ExpertLinear))
    }
    embeddings = {id(module.weight) for module, role in roles.items() if role == "embedding"}
    usual = {
        id(module.weight)
        for module in roles
        if isinstance(module, (nn.Linear, ExpertLinear)) and id(module.weight) not in embeddings
    }
    decayed = set(decayed_parameters(model))
    groups: dict[Any, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        algorithm = algorithm_of(name, patterns)
        is_muon = id(p) in usual if algorithm is None else algorithm == "muon" and id(p) in matrices
        factors = rates.parts(p, "muon" if is_muon else "adamw")
        factor = factors[0] if len(factors) == 1 else 1.0
        options = {
            "algorithm": "muon" if is_muon else "adamw",
            "lr": (lr if is_muon else adamw_lr_multiplier * lr) * factor,
            "weight_decay": (weight_decay if name in decayed else 0.0) / factor,
            "parts": parts_of.get(matrices[id(p)]) if is_muon else None,
            **({"part_rates": factors} if len(factors) > 1 else {}),
        }
        groups.setdefault(tuple(options.values()), {"params": [], **options})["params"].append(p)
    return list(groups.values())
