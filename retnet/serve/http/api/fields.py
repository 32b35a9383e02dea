"""Request fields that completions and chat share: types, limits, and how they become a request of the engine.

A field that is null is not given. A field that the server does not honour is refused by name, unless it has the value
that changes nothing, which clients send by default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from retnet.models.decode.sampling import Sampling
from retnet.serve.http.api.refused import REFUSED, Refusals, honoured
from retnet.serve.http.errors import ApiError
from retnet.serve.http.service import Service
from retnet.serve.request import Request
from retnet.system.checks import quoted

MAX_CHOICES = 128  # of one HTTP request: prompts times n
MAX_STOPS, MAX_STOP_LENGTH = 64, 4096  # strings, and characters of all of them
MAX_BIASES = 4096
MAX_LABELS, MAX_LABEL_LENGTH = 16, 512
SMALLEST_TEMPERATURE = 1e-6  # below it the likeliest token is as good as certain
LIKELIEST_ALONE = 1e-30  # a top_p that keeps one token
SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of the choices of a prompt
SEED_MASK = 2**63 - 1
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


Label = Annotated[str, Field(max_length=MAX_LABEL_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def wrong(accepted: str) -> PydanticCustomError:
    """The error of a value that is not one of these; a message names the field and the value before it."""
    return PydanticCustomError("accepted", "{accepted}", {"accepted": f"accepted: {accepted}"})


def _stop_strings(given: Any) -> list[str]:
    strings = [given] if isinstance(given, str) else given
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOPS
        or not all(isinstance(string, str) and string for string in strings)
        or sum(map(len, strings)) > MAX_STOP_LENGTH
    ):
        raise wrong(
            f"a string of 1 or more characters, or a list of at most {MAX_STOPS} of them, of at most {MAX_STOP_LENGTH} "
            "characters together"
        )
    return strings


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(None, description="Send the usage in one more chunk before the end.")
    continuous_usage_stats: bool | None = Field(
        None, description="Send the usage so far in every chunk. Needs include_usage."
    )
    include_obfuscation: bool | None = Field(None, description="Refused where true: chunks are not padded.")


@dataclass(frozen=True)
class Stops:
    """What ends an output beside the model's own end tokens.

    strings: looked for in the text. tokens: the token's id, or the string that spelled it.
    """

    strings: tuple[str, ...] = ()
    tokens: Mapping[int, str | int] = field(default_factory=dict)


class SamplingFields(BaseModel):
    """The fields that completions and chat share."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[Refusals] = REFUSED

    model: str | None = Field(None, description="The model's name, as /v1/models lists it.", examples=["retnet"])
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="New tokens at most. The prompt and they must fit into the context."
    )
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="The same as max_tokens. If both are given, they must be equal."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None,
        description=f"Choices per prompt, 1 by default; prompts times n is at most {MAX_CHOICES}. Choice i is sampled "
        f"with the seed (seed + {SEED_STEP:#x} i) modulo 2^63.",
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None,
        description="The same request with the same seed gives the same tokens, alone or among other requests. Drawn "
        "if not given. Negative seeds are taken modulo 2^63.",
    )
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None, description="1 by default. 0, and anything below 1e-6, takes the likeliest token.", examples=[0.7]
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Keep the fewest likeliest tokens whose probabilities sum to at least this. 1: off. 0: the "
        "likeliest token alone.",
    )
    top_k: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Keep this many of the likeliest tokens. 0 and -1: off."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Keep the tokens that are at least this times as likely as the likeliest. 0: off."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Subtracted from the logits of tokens that are in the output. 0: off."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Subtracted from the logits of tokens once per occurrence in the output. 0: off."
    )
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(
        None,
        description="Logits of tokens in the prompt or the output are divided by it if positive, else multiplied. 1: "
        "off.",
    )
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        None,
        description=f"Token id, as text, to the number that is added to its logit. At most {MAX_BIASES}.",
        examples=[{"10": -100}],
    )
    stop: Annotated[list[str], PlainValidator(_stop_strings, json_schema_input_type=str | list[str])] | None = Field(
        None,
        description=f"Strings that end the text and are left out of it, at most {MAX_STOPS}, of at most "
        f"{MAX_STOP_LENGTH} characters together. The spelling of a special token also stands for the token.",
        examples=["\n\n"],
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = Field(
        None, description=f"Tokens that end the text and are left out of it, at most {MAX_STOPS}."
    )
    ignore_eos: bool | None = Field(
        None, description="Continue after the end tokens of the model and the tokenizer, which have no text."
    )
    stream: bool | None = Field(None, description="Send server-sent events while the text is generated.")
    stream_options: StreamOptions | None = Field(None, description="Accepted with stream alone.")
    response_format: dict[str, Any] | None = Field(
        None,
        description='{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"name", '
        '"schema"}}: the text is JSON, of the schema.',
        examples=[{"type": "json_object"}],
    )
    structured_outputs: dict[str, Any] | None = Field(
        None,
        description='One of {"json": schema}, {"regex": pattern}, {"choice": [strings]}, {"grammar": Lark grammar}, '
        '{"json_object": true}: the text has this form. Not together with response_format.',
        examples=[{"choice": ["yes", "no"]}],
    )
    session_id: str | None = Field(
        None, description="Continue this session: the prompt is the new text alone.", max_length=MAX_LABEL_LENGTH
    )
    keep_session: bool | None = Field(
        None, description="Keep the state after the response as a session; the response has its id."
    )
    user: Label | None = Field(None, description="A label. It changes nothing.")
    metadata: Annotated[dict[Label, Label], Field(max_length=MAX_LABELS)] | None = Field(
        None, description=f"At most {MAX_LABELS} labels. They change nothing."
    )

    @model_validator(mode="before")
    @classmethod
    def _honoured(cls, given: Any) -> Any:
        return honoured(given, cls.model_fields, cls.refused) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _agree(self) -> SamplingFields:
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ApiError(
                400,
                f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; accepted: one of them, or equal numbers",
                param="max_completion_tokens",
            )
        options = self.stream_options
        if options is None:
            return self
        if not self.stream:
            raise ApiError(400, "stream_options without stream; accepted with stream: true", param="stream_options")
        if options.include_obfuscation:
            raise ApiError(
                400,
                "include_obfuscation is not honoured by this server (accepted: null, false)",
                param="stream_options.include_obfuscation",
            )
        if options.continuous_usage_stats and not options.include_usage:
            raise ApiError(
                400,
                "continuous_usage_stats without include_usage; accepted together",
                param="stream_options.continuous_usage_stats",
            )
        return self

    @property
    def choices(self) -> int:
        """Choices per prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_model(self, service: Service) -> None:
        """Raise ApiError, a 404, for the name of another model."""
        if self.model is not None and self.model not in service.model_names:
            raise ApiError(
                404,
                f"there is no model {quoted(self.model)}; accepted: {', '.join(map(quoted, service.model_names))}",
                param="model",
                code="model_not_found",
            )

    def stops(self, service: Service) -> Stops:
        """What ends the output. Raises ApiError for a token outside the vocabulary."""
        strings = self.stop or []
        tokens: dict[int, str | int] = {}
        for token in self.stop_token_ids or ():
            check_token(token, service.vocab_size, "stop_token_ids")
            tokens[token] = token
        special = service.tokenizer.special_tokens if strings else {}
        for string in strings:
            if string in special:
                tokens[special[string]] = string
        return Stops(tuple(dict.fromkeys(strings)), tokens)

    def sampling(self, vocab_size: int, *, choice: int = 0, logprobs: int | None = None) -> Sampling:
        """The sampling of one choice. Raises ApiError for a token outside the vocabulary.

        logprobs: how many of the likeliest tokens to report, at most 20; None reports nothing.
        """
        bias = {_token_of(key, vocab_size): value for key, value in (self.logit_bias or {}).items()}
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            temperature=0.0 if temperature < SMALLEST_TEMPERATURE else temperature,
            top_k=None if self.top_k in (None, 0, -1) else self.top_k,
            top_p=None if self.top_p in (None, 1) else self.top_p or LIKELIEST_ALONE,
            min_p=self.min_p or None,
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            logit_bias=bias,
            logprobs=logprobs,
            seed=None if self.seed is None else (self.seed + choice * SEED_STEP) & SEED_MASK,
        )

    def new_tokens(self, num_prompt: int, service: Service, default: int | None) -> int:
        """New tokens at most, for a prompt of so many tokens, with those of its session.

        default: where the request gives no number, as far as there is room; None for all the room.

        Raises ApiError, `context_length_exceeded`, where the prompt and the new tokens do not fit.
        """
        check_prompt_length(num_prompt, service)
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        asked = getattr(self, name)
        most, context = service.settings.max_new_tokens, service.context_limit
        if asked is None:
            limits = [x for x in (default, most, None if context is None else context - num_prompt) if x is not None]
            if not limits:
                raise ApiError(
                    400, "max_tokens is missing; accepted: an integer, as the context has no end", param=name
                )
            asked = max(1, min(limits))
        elif most is not None and asked > most:
            raise ApiError(400, f"{name} is {asked}; accepted: at most {most}, this server's limit", param=name)
        if context is not None and num_prompt + asked > context:
            raise ApiError(
                400,
                f"the prompt has {num_prompt} tokens and {name} is {asked}; accepted: at most {context} together, the "
                "context of this server",
                param=name,
                code="context_length_exceeded",
            )
        return asked

    def to_request(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        service: Service,
        stops: Stops,
        *,
        choice: int = 0,
        logprobs: int | None = None,
        **options: Any,
    ) -> Request:
        """The engine's request for one choice of a prompt, whose tokens are in the vocabulary.

        options: further fields of Request (grammar, prompt_logprobs, prefix_group, counted, keep_state).
        """
        ends, ignore_eos = set(stops.tokens), bool(self.ignore_eos)
        if service.tokenizer.document_end is not None and not ignore_eos:
            ends.add(service.tokenizer.document_end)
        return Request(
            prompt,
            max_new_tokens,
            self.sampling(service.vocab_size, choice=choice, logprobs=logprobs),
            sorted(ends),
            stops.strings,
            ignore_eos=ignore_eos,
            **options,
        )


def check_prompt_length(num_prompt: int, service: Service) -> None:
    """Raise ApiError for a prompt that is longer than the server's limit, or fills the context."""
    limit, why = service.settings.max_prompt_tokens, "this server's limit"
    if service.context_limit is not None and (limit is None or service.context_limit < limit):
        limit, why = service.context_limit, "this model's context"
    if limit is not None and num_prompt > limit:
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens; accepted: at most {limit}, {why}",
            param="prompt",
            code="context_length_exceeded",
        )


def check_token(token: int, vocab_size: int, field: str) -> None:
    """Raise ApiError for a token outside the vocabulary."""
    if not 0 <= token < vocab_size:
        raise ApiError(
            400, f"{field} has token {quoted(token)}; accepted: 0 to {vocab_size - 1}, the vocabulary", param=field
        )


def check_tokens(tokens: Sequence[int], vocab_size: int, field: str) -> None:
    """Raise ApiError if a token is outside the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        check_token(next(token for token in tokens if not 0 <= token < vocab_size), vocab_size, field)


def _token_of(key: str, vocab_size: int) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise ApiError(
            400,
            f"logit_bias has the key {quoted(key)}; accepted: token ids in decimal digits, 0 to {vocab_size - 1}",
            param="logit_bias",
        )
    check_token(int(key), vocab_size, "logit_bias")
    return int(key)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
