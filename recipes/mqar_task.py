"""The multi-query associative recall task (MQAR) of Arora et al. 2024 (arXiv 2402.18668; arXiv 2312.04927, section 4).

    k1 v1 k2 v2 ... kP vP | r r k2 r r r kP r k1 ...          at each repeated key, the model must predict its value

The first 2 P tokens are P pairs of distinct keys (tokens 1 .. vocab / 2 - 1) and distinct values (vocab / 2 .. vocab -
1). In the rest, every second position may hold a query. Each key is queried once, at a position drawn without
replacement. The probability follows a power law a g^(a - 1) of the distance g from the pairs, a = 0.01, so most
queries come early and some come late. All other positions hold random tokens. Batches are drawn on the device and not
stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

POWER = 0.01


@dataclass(frozen=True)
class Recall:
    """Sequences of `length` tokens with `pairs` pairs. As in the paper, length is at least 4 times pairs."""

    length: int
    pairs: int
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        if self.length % 2 or self.length < 4 * self.pairs or self.pairs < 1:
            raise ValueError(
                f"length is {self.length} with {self.pairs} pairs; accepted: an even number, at least 4 per pair"
            )
        if self.vocab_size <= self.length or self.vocab_size % 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; accepted: an even number above length {self.length}")

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """ids [size, length], positions [size, pairs] of the queries, and the value [size, pairs] of each query."""
        device, half, P = generator.device, self.vocab_size // 2, self.pairs

        def distinct(low: int, high: int) -> Tensor:
            """P different tokens in [low, high) per row."""
            odds = torch.rand(size, high - low, generator=generator, device=device)
            return odds.topk(P).indices + low

        keys, values = distinct(1, half), distinct(half, self.vocab_size)
        ids = torch.randint(self.vocab_size, (size, self.length), generator=generator, device=device)
        ids[:, 0 : 2 * P : 2], ids[:, 1 : 2 * P : 2] = keys, values
        places = 2 * P + 2 * self._gaps(size, generator)
        return ids.scatter_(1, places, keys), places, values

    def _gaps(self, size: int, generator: torch.Generator) -> Tensor:
        """P different gaps per row, drawn by the power law without replacement: the largest log odds + Gumbel noise."""
        space = (self.length - 2 * self.pairs) // 2
        distance = torch.arange(1, space + 1, device=generator.device, dtype=torch.float32)
        noise = -torch.empty(size, space, device=generator.device).exponential_(generator=generator).log()
        return ((POWER - 1) * distance.log() + noise).topk(self.pairs).indices
