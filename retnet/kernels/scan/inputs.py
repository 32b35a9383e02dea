"""The inputs of a selective scan as the kernels read them, and the tile of states and channels that a program owns."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retnet.kernels.architectures import Architecture, architecture
from retnet.kernels.segments import Segments

LANE_NUMBERS = 16  # of state, per thread: a program is a warp


def numbers_per_program(hardware: Architecture | None) -> int:
    """The numbers of state of a program. All states of a channel are in one thread where there are at most 16."""
    return LANE_NUMBERS * (32 if hardware is None else hardware.lanes)


@dataclass(frozen=True)
class Scan:
    """One call's inputs as the kernels read them: D channels or N states per token, tokens one stride apart."""

    x: Tensor
    step: Tensor
    rate: Tensor
    write: Tensor
    read: Tensor
    state: Tensor | None
    segments: Segments
    N: int
    BN: int
    BD: int

    @classmethod
    def of(
        cls,
        x: Tensor,
        step: Tensor,
        rate: Tensor,
        write: Tensor,
        read: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        segment: int,
    ) -> "Scan":
        """segment: tokens per segment, a multiple of the backward's RUN; the state [N, D] before each one is kept."""
        B, T, D = x.shape
        N = rate.shape[1]
        BN = triton.next_power_of_2(N)
        BD = min(max(1, numbers_per_program(architecture(x.device)) // BN), triton.next_power_of_2(D))
        state = None if state is None else state.float().contiguous()
        return cls(
            *(_token_rows(z) for z in (x, step)),
            rate.float().contiguous(),
            *(_token_rows(z) for z in (write, read)),
            state,
            Segments.of(B, T, segment, cu_seqlens),
            N,
            BN,
            BD,
        )

    @property
    def D(self) -> int:
        return self.x.shape[2]

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.D, self.BD)

    @property
    def shapes(self) -> dict[str, int | bool]:
        """Constants of every kernel."""
        return {
            "D": self.D,
            "N": self.N,
            "BN": self.BN,
            "BD": self.BD,
            "L": self.segments.length,
            "PACKED": self.segments.packed,
        }

    def per_slot(self, *shape: int) -> Tensor:
        """Empty float32 numbers for every segment."""
        return torch.empty(self.segments.num_slots, *shape, dtype=torch.float32, device=self.x.device)


def _token_rows(z: Tensor) -> Tensor:
    """[B, T, W] whose tokens are one stride apart through the whole batch (a part of a wider tensor will do)."""
    return z if z.stride(2) == 1 and (z.shape[0] == 1 or z.stride(0) == z.shape[1] * z.stride(1)) else z.contiguous()


@triton.jit
def tile(D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """(slot or sequence of the program, its states, its channels, which of them exist, their offsets in [N, D])."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    n = tl.arange(0, BN)
    d = pid % BLOCKS * BD + tl.arange(0, BD)
    ok = (n < N)[:, None] & (d < D)[None, :]
    return pid // BLOCKS, n, d, ok, n[:, None] * D + d[None, :]


@triton.jit
def load_row(pointer, token, stride, columns, ok):
    """One token's values, float32."""
    return tl.load(pointer + token * stride + columns, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_rates(rate, n, d, ok, N: tl.constexpr):
    """The rates [BN, BD] of a tile, from [D, N]."""
    return tl.load(rate + d[None, :] * N + n[:, None], mask=ok, other=0.0)


@triton.jit
def next_state(h, step, u, write, rates):
    """exp(step rate) h + u write: the state after a token, with u = step x."""
    return tl.exp(step[None, :] * rates) * h + u[None, :] * write[:, None]
