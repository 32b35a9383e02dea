"""What a caller asks for, and what becomes of it."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from retnet.models.decode.sampling import Sampling, is_integer
from retnet.serve.snapshot import Snapshot
from retnet.serve.stopping import StopStrings


class Refused(ValueError):
    """A request that this engine cannot serve, now or ever; the message says why."""


class Failed(RuntimeError):
    """A request that could not be served to its end; the message says why."""


class Status(Enum):
    WAITING = "waiting"  # for a slot
    READING = "reading"  # its prompt
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    max_new_tokens: None goes on until stopped or cancelled. stop_tokens end the output and are its last token, as does
    the model's end-of-text token unless ignore_eos. stop_strings end it where they are complete, across token borders.
    shared: so many first tokens of the prompt will begin other prompts too; the prefix cache keeps the state there.
    keep_state: leave a snapshot when it ends.
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
    """Natural log of the model's probability of a token, and of the likeliest ones, likeliest first."""

    logprob: float
    top: dict[int, float]


@dataclass(eq=False)
class Generation:
    """A request on its way. `finish_reason`: length, stop_token, stop_string, cancelled, or failed (`error` says why).

    tokens: those of the output so far. seen: all tokens of its context, earlier ones of a snapshot included (4 bytes
    each); the state has read the first `read` of them. cached: how many of those were not read but found.
    counted_from: where the output begins for penalties: earlier, if it only goes on. shared_end: of what the prompt
    shares with others. owner: what its engine knows it by; not the engine itself, whose memory would then wait for the
    garbage collector.
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
        """The output up to a stop string, if stop strings were asked for."""
        return None if self.stops is None else self.stops.text

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def unread(self) -> int:
        """Tokens before the last one that the state has not read: the last is read by the step that follows it."""
        return len(self.seen) - 1 - self.read
