"""Sampling: from logits to tokens for all slots at once. The options of each request are rows of tables.

The random number of a token is a hash of the request's seed and the token's position, not the next draw of a generator.
A request therefore gets the same tokens whatever else is in the batch, after it is restored elsewhere, and when several
tokens are checked at once. Everything runs on the device, without waiting for the host, in fixed shapes.

A step leaves out the parts that no running request needs (sorting for top-k and top-p, penalties, log-probabilities).
Those parts change no bit of the results of other rows, so a request cannot tell.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from retnet.ops.tensor_shard import TensorShard
from retnet.system.checks import is_integer, is_number, quoted

TOP_LOGPROBS = 20  # alternatives that a request may ask for, at most


class FrozenDict(dict):
    """A dict that does not change, and that JSON, pickle and copies take as they take any other."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("this mapping does not change; accepted: a new Sampling made from a changed copy, dict(...)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override] (a dict has none)
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple:
        return type(self), (dict(self),)


def _own_bias(given: Mapping[Any, Any]) -> FrozenDict:
    accepted = "accepted: token ids, and -1e30 to 1e30 or minus infinity"
    try:
        items = list(given.items())
    except Exception as error:  # from the caller's own mapping
        raise ValueError(f"logit_bias cannot be read ({error!r}); {accepted}") from error
    for token, bias in items:
        banned = isinstance(bias, Real) and bias == -math.inf
        if not (is_integer(token, -math.inf) and (banned or is_number(bias, -1e30, 1e30))):
            raise ValueError(f"logit_bias has {quoted(token)}: {quoted(bias)}; {accepted}")
    return FrozenDict({int(token): float(bias) for token, bias in items})


@dataclass(frozen=True)
class Sampling:
    """Sampling options of one request, applied in this order: penalties, bias, temperature, top-k, top-p, min-p. A
    grammar's mask comes before them all.

    Everything is checked and copied here: what the caller does with a mapping afterwards changes nothing.

    temperature: 0 takes the likeliest token.
    top_k: keep the k likeliest tokens. top_p: keep the fewest likeliest tokens whose probabilities sum to at least p.
    min_p: keep the tokens that are at least p times as likely as the likeliest.
    repetition_penalty: logits of tokens in the prompt or the output are divided by it if positive, else multiplied
    (arXiv 1909.05858). presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once or
    once per occurrence. logit_bias: added to the logits of these tokens.
    logprobs: how many of the likeliest tokens to report beside the chosen one, by the model's own distribution (before
    all of the above); None reports nothing.
    seed: the same request with the same seed gives the same tokens; drawn if None.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, accepted: str, is_right: Callable[[Any], bool]) -> None:
            value = getattr(self, name)
            if not is_right(value):
                raise ValueError(f"{name} is {quoted(value)}; accepted: {accepted}")

        def maybe(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
            return lambda value: value is None or is_right(value)

        check("temperature", "0 (greedy), or 1e-6 to 1e6", lambda t: is_number(t, 0, 1e6) and (t == 0 or t >= 1e-6))
        check("top_k", "None, or an integer of 1 or more", maybe(lambda k: is_integer(k, 1)))
        check("top_p", "None, or 0 < top_p <= 1", maybe(lambda p: is_number(p, 0, 1) and p > 0))
        check("min_p", "None, or 0 <= min_p <= 1", maybe(lambda p: is_number(p, 0, 1)))
        check("repetition_penalty", "1e-6 to 1e6", lambda r: is_number(r, 1e-6, 1e6))
        check("presence_penalty", "-1e6 to 1e6", lambda x: is_number(x, -1e6, 1e6))
        check("frequency_penalty", "-1e6 to 1e6", lambda x: is_number(x, -1e6, 1e6))
        check(
            "logprobs", f"None, or an integer of 0 to {TOP_LOGPROBS}", maybe(lambda n: is_integer(n, 0, TOP_LOGPROBS))
        )
        check("seed", "None, or an integer of 0 to 2^63 - 1", maybe(lambda n: is_integer(n, 0, 2**63 - 1)))
        check("logit_bias", "a mapping of token ids to numbers", lambda bias: isinstance(bias, Mapping))
        object.__setattr__(self, "logit_bias", _own_bias(self.logit_bias))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._set(name, float)
        for name in ("top_k", "logprobs", "seed"):
            self._set(name, int)

    def _set(self, name: str, convert: Callable[[Any], Any]) -> None:
        """Replace a value by our own copy of it; None stays."""
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, convert(value))

    @property
    def parts(self) -> "SamplingParts":
        edits = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return SamplingParts(
            draws=self.temperature > 0,
            filters=self.top_k is not None or self.top_p is not None or self.min_p is not None,
            edits=edits or bool(self.logit_bias),
            logprobs=self.logprobs is not None,
        )


class SamplingParts(NamedTuple):
    """The parts of sampling that a step needs: those that any of its requests needs. masks: those of grammars."""

    draws: bool = False
    filters: bool = False
    edits: bool = False
    logprobs: bool = False
    masks: bool = False

    @classmethod
    def union(cls, parts: "Iterable[SamplingParts]") -> "SamplingParts":
        return cls(*(any(column) for column in zip(cls(), *parts)))


class Sampled(NamedTuple):
    """tokens [R]; with log-probabilities: logprobs [R] of them, top_tokens and top_logprobs [R, TOP_LOGPROBS]."""

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Sampled":
        """The same with a function applied to every tensor."""
        return Sampled(change(self.tokens), *(None if x is None else change(x) for x in self[1:]))


class SamplingTable:
    """The sampling options of the requests in R slots, on the device; captured graphs read the tables in place.

    width: tokens that one step samples per slot. masks: int32 [R, width, words], the tokens that each of them may be:
    token t is bit t % 32 of word t // 32. On a GPU they are filled in pinned memory and copied before a step.
    shard: of a split model; the tokens of process 0 are then those of all processes.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        device: torch.device,
        width: int = 1,
        shard: TensorShard | None = None,
    ):
        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((num_slots,), value, dtype=dtype, device=device)

        self.vocab_size, self.shard = vocab_size, shard
        self._largest_k: int | None = None  # of all slots, where it may shape the computation
        self.temperature, self.top_p, self.min_p = column(0), column(1), column(0)
        self.top_k, self.seed = column(vocab_size, torch.long), column(0, torch.long)
        self.repetition, self.presence, self.frequency = column(1), column(0), column(0)
        self.bias = torch.zeros(num_slots, vocab_size, device=device)
        self.seen = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self.masks = torch.full((num_slots, width, mask_words(vocab_size)), -1, dtype=torch.int32, device=device)
        self._bits = (1 << torch.arange(8, device=device)).to(torch.uint8)
        self._pinned = None
        if device.type == "cuda":
            self._pinned = torch.full(self.masks.shape, -1, dtype=torch.int32, pin_memory=True)
        self._masked: set[int] = set()  # slots whose masks may exclude tokens

    @classmethod
    def bytes_per_slot(cls, vocab_size: int, width: int = 1) -> int:
        """Memory on the device."""
        table = cls(1, vocab_size, torch.device("meta"), width)
        rows = [x for x in vars(table).values() if isinstance(x, Tensor) and len(x) == 1]
        return sum(x.numel() * x.element_size() for x in rows)

    def fill(self, slot: int, sampling: Sampling, seed: int, seen: Tensor, generated: Tensor) -> None:
        """Set the options of one slot; seen and generated are its token ids so far, with and without the prompt."""
        self._set(slot, sampling, seed)
        self.bias[slot].zero_()  # always: the step of another request may add it
        if slot in self._masked:
            self.host_masks(slot).fill_(-1)
            self.upload_masks([slot])
            self._masked.discard(slot)
        if not sampling.parts.edits:
            return  # the penalties are neutral, whatever is counted
        device = self.bias.device
        if sampling.logit_bias:  # perhaps one for each token of the vocabulary
            tokens, biases = zip(*sampling.logit_bias.items(), strict=True)
            self.bias[slot, torch.tensor(tokens, device=device)] = torch.tensor(
                biases, dtype=self.bias.dtype, device=device
            )
        self.seen[slot].zero_()
        self.seen[slot, seen.to(device)] = True
        self.counts[slot] = torch.bincount(generated.cpu(), minlength=self.vocab_size).to(device)

    def fill_alike(self, sampling: Sampling, seeds: Tensor) -> None:
        """Set the same options for all slots, without penalties or bias, and a seed [R] for each."""
        assert not sampling.parts.edits
        self._largest_k = None if sampling.top_k is None else min(sampling.top_k, self.vocab_size)
        self._set(slice(None), sampling, seeds)

    def _set(self, slots: int | slice, sampling: Sampling, seed: int | Tensor) -> None:
        self.temperature[slots] = sampling.temperature
        self.top_k[slots] = min(sampling.top_k or self.vocab_size, self.vocab_size)
        self.top_p[slots] = 1.0 if sampling.top_p is None else sampling.top_p
        self.min_p[slots] = sampling.min_p or 0.0
        self.repetition[slots] = sampling.repetition_penalty
        self.presence[slots] = sampling.presence_penalty
        self.frequency[slots] = sampling.frequency_penalty
        self.seed[slots] = seed

    def host_masks(self, slot: int) -> Tensor:
        """The masks [width, words] of one slot on the host, to be filled and then uploaded."""
        self._masked.add(slot)
        return (self.masks if self._pinned is None else self._pinned)[slot]

    def upload_masks(self, slots: Collection[int]) -> None:
        """Copy the masks of these slots to the device, and those between them, in one transfer. The caller waits for a
        step before it fills them again."""
        if self._pinned is not None and slots:
            rows = slice(min(slots), max(slots) + 1)
            self.masks[rows].copy_(self._pinned[rows], non_blocking=True)

    def record(self, tokens: Tensor, written: Tensor) -> None:
        """Count tokens [R] where written [R] is True."""
        slots = torch.arange(len(tokens), device=tokens.device)
        self.seen[slots, tokens] |= written
        self.counts[slots, tokens] += written.int()

    def sample(self, logits: Tensor, position: Tensor, parts: SamplingParts, place: int = 0) -> Sampled:
        """One token per slot from logits [R, vocab]; position [R] is the position that the new token will have.

        place: which of the tokens that the step samples, for the masks.
        """
        if parts.draws or parts.filters or parts.edits or parts.logprobs:
            logits = logits.float()  # the likeliest token is the same in either precision
        scores = self._masked_by_grammar(logits, place) if parts.masks else logits
        chosen = self._choose(self._edited(scores) if parts.edits else scores, position, parts)
        if self.shard is not None:
            chosen = self.shard.first_(chosen)
        if not parts.logprobs:
            return Sampled(chosen)
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(TOP_LOGPROBS, self.vocab_size), -1)
        return Sampled(chosen, logprobs.gather(-1, chosen[:, None])[:, 0], top.indices, top.values)

    def _masked_by_grammar(self, logits: Tensor, place: int) -> Tensor:
        # By bytes, whose order is that of the tokens in little-endian words: a quarter of the memory traffic of words.
        octets = self.masks[:, place].view(torch.uint8)[..., None]
        return logits.masked_fill((octets & self._bits == 0).flatten(1)[:, : self.vocab_size], -torch.inf)

    def _edited(self, logits: Tensor) -> Tensor:
        repetition = self.repetition[:, None]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(self.seen, repeated, logits)
        logits = logits - self.presence[:, None] * (self.counts > 0) - self.frequency[:, None] * self.counts
        return logits + self.bias

    def _choose(self, logits: Tensor, position: Tensor, parts: SamplingParts) -> Tensor:
        if not parts.draws:
            return logits.argmax(-1)
        greedy = self.temperature == 0
        scaled = logits / self.temperature.masked_fill(greedy, 1)[:, None]
        if parts.filters:
            limits = (x[:, None] for x in (self.top_k, self.top_p, self.min_p))
            scaled = filter_logits(scaled, *limits, largest_k=self._largest_k)
        mass = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
        drawn = uniform(self.seed, position)[:, None] * mass[:, -1:]
        sampled = torch.searchsorted(mass, drawn, right=True)[:, 0].clamp_max(self.vocab_size - 1)
        return torch.where(greedy, logits.argmax(-1), sampled)


def mask_words(vocab_size: int) -> int:
    """Words of 32 bits in a mask of the vocabulary."""
    return -(-vocab_size // 32)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, largest_k: int | None = None) -> Tensor:
    """Logits [R, vocab] with minus infinity where top-k, then top-p, then min-p [R, 1] exclude a token.

    The likeliest token always stays, and so does the token that crosses p: top-p drops a token if the likelier ones
    alone reach p. largest_k: a bound on top_k known to the host, which saves sorting the whole vocabulary.
    """
    ordered, order = logits.sort(stable=True, dim=-1, descending=True) if largest_k is None else logits.topk(largest_k)
    rank = torch.arange(ordered.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
    probability = ordered.softmax(-1)
    reached = probability.cumsum(-1, dtype=torch.float64) - probability >= top_p
    dropped = (rank >= top_k) | (reached & (top_p < 1))
    dropped |= probability < min_p * probability[:, :1]
    dropped[:, 0] = False
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).scatter_(-1, order, dropped), -torch.inf)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Pseudorandom numbers in [0, 1), float64: splitmix64 (Steele et al. 2014) of seed and position, int64."""
    x = _mixed(seed) + (position + 1) * _signed(0x9E3779B97F4A7C15)
    return _shifted(_mixed(x), 24).double() * 2.0**-40


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical right shift, as int64 shifts keep the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
