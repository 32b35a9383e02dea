"""Requests and their generations."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from retnet.models.decode.sampling import Sampling, is_integer
from retnet.serve.snapshot import Snapshot
from retnet.serve.stopping import StopStrings


class Refused(ValueError):
    """The engine cannot serve this request, now or ever; the message says why."""


class Failed(RuntimeError):
    """The request could not be served to its end; the message says why."""


class Status(Enum):
    WAITING = "waiting"  # for a slot
    READING = "reading"  # its prompt
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(frozen=True)
class Request:
    """One prompt and the options of its output.

    max_new_tokens: None continues until stopped or cancelled.
    stop_tokens: each ends the output and is its last token. So do the model's end-of-text tokens, unless ignore_eos.
    stop_strings: each ends the output as soon as it is complete, also across token boundaries.
    shared: how many first tokens the prompt shares with other prompts; the prefix cache keeps the state after them.
    keep_state: take a snapshot when the request ends.
    """

    prompt: Sequence[int]
    max_new_tokens: int | None = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False
    shared: int = 0
    keep_state: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            raise ValueError("prompt is text; accepted: token ids")
        if isinstance(self.stop_strings, str):
            raise ValueError(f"stop_strings is {self.stop_strings!r}; accepted: a sequence of strings")
        if self.max_new_tokens is not None and not is_integer(self.max_new_tokens, -math.inf):
            raise ValueError(f"max_new_tokens is {self.max_new_tokens!r}; accepted: an integer, or None for no end")
        if not is_integer(self.shared, 0, len(self.prompt)):
            raise ValueError(f"shared is {self.shared!r}; accepted: 0 to {len(self.prompt)}, the prompt's tokens")


@dataclass
class TokenLogprobs:
    """Natural log of the model's probability of a token, and of the likeliest tokens in falling order."""

    logprob: float
    top: dict[int, float]


@dataclass(eq=False)
class Generation:
    """A submitted request and its output so far.

    finish_reason: length, stop_token, stop_string, cancelled, or failed (`error` says why).
    tokens: the output so far.
    seen: all tokens of the context, with those of a snapshot (4 bytes each); the state has read the first `read`.
    cached: how many of them came from the prefix cache instead of being read.
    counted_from: where the output begins for penalties; a continued output began earlier.
    shared_end: where the part of the prompt ends that other prompts share.
    owner: identifies the engine. It is not the engine itself, whose memory would then wait for the garbage collector.
    """

    owner: object = field(repr=False)
    request: Request = field(repr=False)
    seed: int
    seen: array = field(repr=False)
    read: int
    output_start: int
    counted_from: int
    shared_end: int
    start: Snapshot | None = field(default=None, repr=False)
    stops: StopStrings | None = None
    status: Status = Status.WAITING
    finish_reason: str | None = None
    error: str | None = None
    slot: int | None = None
    cached: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    snapshot: Snapshot | None = None

    @property
    def tokens(self) -> list[int]:
        return self.seen[self.output_start :].tolist()

    @property
    def num_new(self) -> int:
        return len(self.seen) - self.output_start

    @property
    def text(self) -> str | None:
        """The output up to a stop string, if the request has stop strings."""
        return None if self.stops is None else self.stops.text

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def unread(self) -> int:
        """How many tokens prefill still has to read; the last one is left to the first decode step."""
        return len(self.seen) - 1 - self.read
