"""Random retention problems: every argument of the operator, odd sizes, hard resets, masked tokens and ragged packs."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor


@dataclass
class Problem:
    """Float64 inputs of `retention` and cotangents of its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    state: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    dout: Tensor
    dstate: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same problem rounded to `dtype`; decay and state stay float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = dict.fromkeys(("q", "k", "v", "dout"), dtype) | dict.fromkeys(("log_decay", "state", "dstate"), wide)
        return replace(self, **{name: getattr(self, name).to(kind) for name, kind in dtypes.items()})

    def solve(self, form, **options) -> dict[str, Tensor]:
        """Results and gradients of `form` by name, in float64."""
        inputs = {n: getattr(self, n).detach().clone().requires_grad_() for n in ("q", "k", "v", "log_decay", "state")}
        out, state = form(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            inputs["log_decay"],
            state=inputs["state"],
            mask=self.mask,
            cu_seqlens=self.cu_seqlens,
            **options,
        )
        loss = (out.double() * self.dout.double()).sum() + (state.double() * self.dstate.double()).sum()
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
        solved = {"out": out, "final": state} | {f"d{n}": g for n, g in zip(inputs, gradients)}
        return {name: x.detach().double() for name, x in solved.items()}


def make_problem(
    B=1, T=16, G=1, H=2, K=8, V=8, *, per_token=False, resets=False, holes=False, packed=False, fastest=1.0, seed=0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    B = 1 if packed else B
    cu_seqlens, N = None, B
    if packed:
        cuts = torch.randint(0, T + 1, (3,), generator=generator).sort().values
        cu_seqlens, N = torch.cat([torch.tensor([0]), cuts, torch.tensor([T])]), 4
    # Rates spread over decades, so that long and short memories meet in one problem.
    shape = (B, T, H) if per_token else (H,)
    log_decay = -fastest * 10 ** (-4 * uniform(*shape))
    if resets:
        hit = uniform(*shape) < 0.2
        values = torch.tensor([-1000.0, -torch.inf, -120.0], dtype=torch.float64)
        log_decay = torch.where(hit, values[(uniform(*shape) * 3).long()], log_decay)
    return Problem(
        q=normal(B, T, G, K),
        k=normal(B, T, G, K),
        v=normal(B, T, H, V),
        log_decay=log_decay,
        state=normal(N, H, K, V),
        mask=uniform(B, T) < 0.7 if holes else None,
        cu_seqlens=cu_seqlens,
        dout=normal(B, T, H, V),
        dstate=normal(N, H, K, V),
    )


def relative_error(x: Tensor, reference: Tensor) -> float:
    norm = reference.double().norm().item()
    error = (x.double() - reference.double()).norm().item()
    return error / norm if norm else error


@pytest.fixture(autouse=True)
def _two_threads_at_most():
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    yield
    torch.set_num_threads(threads)
