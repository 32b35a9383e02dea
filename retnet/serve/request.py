"""Requests and their generations."""

import math
from array import array
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from retnet.models.decode.sampling import TOP_LOGPROBS, Sampling, SamplingParts
from retnet.models.snapshot import Snapshot
from retnet.serve.constrained import ConstrainedOutput
from retnet.serve.grammar import Grammar
from retnet.serve.logprobs import PromptLogprobs, TokenLogprobs
from retnet.serve.stopping import StopStrings
from retnet.system.checks import copied, copied_integers, is_integer, quoted

LARGEST_TOKEN = 2**31 - 1
LONGEST_GROUP = 256  # characters


class Refused(ValueError):
    """The engine cannot serve this request, now or ever; the message says why."""


class Failed(RuntimeError):
    """The request could not be served to its end; the message says why."""


class Status(Enum):
    """The stage of a request."""

    WAITING = "waiting"  # for a slot
    READING = "reading"  # its prompt
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(frozen=True)
class Request:
    """One prompt and the options of its output. It is checked and copied when it is made, and does not change.

    prompt: token ids, from any iterable of integers.
    max_new_tokens: None continues until stopped or cancelled; with 0 the request ends after its prompt.
    stop_tokens: each ends the output and is its last token. So do the model's end-of-text tokens, unless ignore_eos.
    stop_strings: each ends the output as soon as it is complete, also across token boundaries.
    shared: how many first tokens the prompt shares with other prompts; the prefix cache keeps the state after them.
    keep_state: take a snapshot when the request ends.
    prefix_group: cached prefixes are shared among requests of the same group only; None neither uses nor fills the
    cache.
    prompt_logprobs: how many of the likeliest tokens to report beside each token of the prompt; None reports nothing.
    The prompt is then read whole, whatever is cached.
    grammar: what the output may be. It begins with the output, also after a snapshot, and ends the output where nothing
    may follow.

    counted: tokens of the context that the repetition penalty counts, beside those of the output; None counts all of
    the context. A server leaves out padding and the tokens of a chat template, for example.

    Raises Refused, a ValueError, that says what was given and what is accepted.
    """

    prompt: Sequence[int]
    max_new_tokens: int | None = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False
    shared: int = 0
    keep_state: bool = False
    prefix_group: str | None = ""
    prompt_logprobs: int | None = None
    grammar: Grammar | None = field(default=None, hash=False)
    counted: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, Set):
            raise Refused(f"prompt is a {type(self.prompt).__name__}, which has no order; accepted: token ids in order")
        own: dict[str, Any] = {
            "prompt": _own_tokens("prompt", self.prompt),
            "stop_tokens": _own_tokens("stop_tokens", self.stop_tokens),
            "stop_strings": _own_strings(self.stop_strings),
            "counted": None if self.counted is None else _own_tokens("counted", self.counted),
        }
        if self.max_new_tokens is not None:
            if not is_integer(self.max_new_tokens, -math.inf):
                raise Refused(
                    f"max_new_tokens is {quoted(self.max_new_tokens)}; accepted: an integer, or None for no end"
                )
            own["max_new_tokens"] = int(self.max_new_tokens)
        if not isinstance(self.sampling, Sampling):
            raise Refused(f"sampling is {quoted(self.sampling)}; accepted: a Sampling")
        for name in ("ignore_eos", "keep_state"):
            if not isinstance(getattr(self, name), bool):
                raise Refused(f"{name} is {quoted(getattr(self, name))}; accepted: True or False")
        if not is_integer(self.shared, 0, len(own["prompt"])):
            raise Refused(f"shared is {quoted(self.shared)}; accepted: 0 to {len(own['prompt'])}, the prompt's tokens")
        own["shared"] = int(self.shared)
        own["prefix_group"] = _own_group(self.prefix_group)
        if self.prompt_logprobs is not None:
            if not is_integer(self.prompt_logprobs, 0, TOP_LOGPROBS):
                raise Refused(
                    f"prompt_logprobs is {quoted(self.prompt_logprobs)}; accepted: None, or an integer of 0 to "
                    f"{TOP_LOGPROBS}"
                )
            own["prompt_logprobs"] = int(self.prompt_logprobs)
        if self.grammar is not None and not callable(getattr(self.grammar, "matcher", None)):
            raise Refused(f"grammar is {quoted(self.grammar)}; accepted: a Grammar, or None")
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property
    def parts(self) -> SamplingParts:
        """The parts of sampling that its steps need."""
        return self.sampling.parts._replace(masks=self.grammar is not None)


def _own_tokens(name: str, values: object) -> tuple[int, ...]:
    accepted = f"token ids, integers of 0 to {LARGEST_TOKEN}"
    try:
        return copied_integers(name, values, 0, LARGEST_TOKEN, accepted)
    except ValueError as error:
        raise Refused(str(error)) from error


def _own_group(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > LONGEST_GROUP:
        raise Refused(
            f"prefix_group is {quoted(value)}; accepted: text of at most {LONGEST_GROUP} characters, or None for none"
        )
    return str(value)


def _own_strings(values: object) -> tuple[str, ...]:
    accepted = "a sequence of strings, none of them empty"
    try:
        strings = copied("stop_strings", values, accepted)
    except ValueError as error:
        raise Refused(str(error)) from error
    for string in strings:
        if not isinstance(string, str) or not string:
            raise Refused(f"stop_strings is a sequence with {quoted(string)} in it; accepted: {accepted}")
    return tuple(map(str, strings))


@dataclass(eq=False)
class Generation:
    """A submitted request and its output so far.

    finish_reason: length, stop_token, stop_string, grammar_end, cancelled, or failed (`error` says why). Set a moment
    before `finished`, while the engine takes the request out of its slot.
    tokens: the output so far.
    seen: all tokens of the context, with those of a snapshot (4 bytes each); the state has read the first `read`.
    cached: how many of them came from the prefix cache instead of being read. prefix_miss: why not more of the prompt.
    counted_from: where the output begins for penalties; a continued output began earlier.
    shared_end: where the part of the prompt ends that other prompts share.
    rounding_error: that of the snapshot which the state comes from; the prefix cache keeps exact states only.
    initial: the identity of the learned initial state that the context began from, as in Snapshot.
    awaited: another prompt that is being read, and how many first tokens of it this one will continue from.
    ends: tokens that end the output.
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
    ends: frozenset[int] = field(repr=False)
    start: Snapshot | None = field(default=None, repr=False)
    stops: StopStrings | None = None
    constraint: ConstrainedOutput | None = field(default=None, repr=False)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    error: str | None = None
    slot: int | None = None
    cached: int = 0
    prefix_miss: str | None = None
    rounding_error: float = 0.0
    initial: str | None = None
    awaited: "tuple[Generation, int] | None" = field(default=None, repr=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scores: PromptLogprobs | None = field(default=None, repr=False)
    snapshot: Snapshot | None = None

    @property
    def tokens(self) -> list[int]:
        return self.seen[self.output_start :].tolist()

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None]:
        """One per token of the prompt that is read, if they were asked for. The first token of a context has none."""
        if self.scores is None:
            return []
        first_of_context = len(self.request.prompt) == self.output_start
        return [*([None] if first_of_context else []), *self.scores.tolist()]

    @property
    def prefix_group(self) -> str | None:
        """The group of prompts with which this one shares cached prefixes: those that began from the same state."""
        group = self.request.prefix_group
        return group if group is None or self.initial is None else f"{group}\0{self.initial}"

    @property
    def num_new(self) -> int:
        return len(self.seen) - self.output_start

    def add(self, token: int) -> None:
        try:
            self.seen.append(token)
        except BufferError:  # the caller holds a view of its memory, such as np.asarray(generation.seen)
            self.seen = array("i", [*self.seen, token])

    @property
    def text(self) -> str | None:
        """The output up to a stop string or a stop token, if the request has stop strings."""
        return None if self.stops is None else self.stops.text

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def finish(self, reason: str) -> None:
        """Mark the request as ended; its slot is no longer its own, and its snapshot is not needed."""
        self.start = None
        self.finish_reason = reason
        self.slot = self.awaited = None
        self.status = Status.FINISHED

    def fail(self, error: str) -> None:
        """Mark the request as ended by an error."""
        self.error = error
        self.finish("failed")

    @property
    def unread(self) -> int:
        """How many tokens prefill still has to read; the last one is left to the first decode step."""
        return len(self.seen) - 1 - self.read
