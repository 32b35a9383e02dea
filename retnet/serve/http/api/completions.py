"""`/v1/completions`: prompts as text or token ids, several at once, with several choices each.

An empty prompt ("", [] and [""]) is the document start alone. A text is read after a document start; token ids are read
as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field, PlainValidator

from retnet.models.decode.sampling import TOP_LOGPROBS
from retnet.models.snapshot import Snapshot
from retnet.serve.http.api.completion_answer import Answer, Choice, Prompt
from retnet.serve.http.api.fields import MAX_CHOICES, SamplingFields, check_tokens, wrong
from retnet.serve.http.api.json_body import JsonRoute
from retnet.serve.http.api.off_loop import off_loop
from retnet.serve.http.api.output import Output
from retnet.serve.http.api.refused import REFUSED, Refusals
from retnet.serve.http.api.sse import responded
from retnet.serve.http.errors import ApiError
from retnet.serve.http.grammars.constraints import Constraints, constraint_of
from retnet.serve.http.service import Service
from retnet.serve.http.sessions.use import SessionUse
from retnet.serve.request import Request as EngineRequest
from retnet.serve.stopping import CONTEXT
from retnet.system.sizes import quantity

DEFAULT_MAX_TOKENS = 16  # as OpenAI's
MAX_TOKENS = 2**24  # of all prompts, each counted n times: they are held in memory
MAX_LOGPROBS = 2**19  # of one response
PROMPT_TYPES = str | list[str] | list[int] | list[list[int]]

router = APIRouter(route_class=JsonRoute, tags=["completions"])


def _prompts(given: Any) -> list[Any]:
    prompts = given or [""] if isinstance(given, list) else [given]
    kinds = set(map(type, prompts))
    if isinstance(given, list) and kinds == {int}:
        prompts, kinds = [prompts], {list}
    ids_alone = kinds == {list} and all(set(map(type, ids)) <= {int} for ids in prompts)
    if not (ids_alone or kinds == {str}) or len(prompts) > MAX_CHOICES:
        raise wrong(
            f"a string, token ids (a list of integers), or a list of at most {MAX_CHOICES} strings or lists of token "
            "ids"
        )
    return prompts


class CompletionBody(SamplingFields):
    """A request to continue one or more prompts."""

    refused: ClassVar[Refusals] = REFUSED | {
        "messages": ((), "use /v1/chat/completions"),
        "suffix": (("",), "the models continue a text and do not fill gaps"),
        "tools": (([],), "use /v1/chat/completions"),
        "top_logprobs": ((), "use logprobs, a number"),
    }

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts, json_schema_input_type=PROMPT_TYPES)] = Field(
        description=f"A text, token ids, or a list of at most {MAX_CHOICES} of either. A text is read after a document "
        'start, token ids are read as they are. "", [] and [""] are the document start alone.',
        examples=["The river"],
    )
    echo: bool | None = Field(None, description="Return the prompt before the completion, in text and logprobs.")
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = Field(
        None,
        description=f"Report the log-probability of every token, and this many of the likeliest, 0 to {TOP_LOGPROBS}. "
        "They are the model's own, before penalties, bias and temperature; -9999 stands for minus infinity.",
    )
    best_of: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Accepted where it changes nothing: 1, or equal to n."
    )

    def check(self, service: Service) -> None:
        """Raise ApiError for values that do not go together, or not with this server."""
        self.check_model(service)
        if self.best_of not in (None, 1, self.choices):
            raise ApiError(
                400,
                f"best_of is {self.best_of} and n is {self.choices}; accepted: null, 1, or n, as every choice is "
                "returned",
                param="best_of",
            )
        most = min(MAX_CHOICES, service.most_streams)
        if len(self.prompt) * self.choices > most:
            raise ApiError(
                400,
                f"n is {self.choices} for {quantity(len(self.prompt), 'prompt')}, "
                f"{len(self.prompt) * self.choices} choices; "
                f"accepted: {most} in one request",
                param="n" if len(self.prompt) <= most else "prompt",
            )
        if self.session_id is not None and len(self.prompt) > 1:
            raise ApiError(
                400, f"session_id with {len(self.prompt)} prompts; accepted: one prompt, its new text", param="prompt"
            )

    def num_logprobs(self, num_prompt: int, max_new_tokens: int) -> int:
        """Log-probabilities of one choice, for a prompt of so many tokens."""
        if self.logprobs is None:
            return 0
        return (max_new_tokens + (num_prompt if self.echo else 0)) * (1 + self.logprobs)


EXAMPLE = {
    "id": "cmpl-0f2a",
    "object": "text_completion",
    "created": 1796027428,
    "model": "demo",
    "choices": [{"index": 0, "text": " bends twice", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
    "usage": {
        "prompt_tokens": 10,
        "completion_tokens": 12,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 0, "prefix_miss": "no cached prefix of this prompt"},
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completions; with `stream`, events that carry their text as it comes.",
        "content": {
            "application/json": {"example": EXAMPLE},
            "text/event-stream": {"example": "data: {...}\n\ndata: [DONE]\n\n"},
        },
    }
}


@router.post("/v1/completions", summary="Continue a text", responses=RESPONSES)
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue a text, or several. With `stream`, the response is a stream of server-sent events."""
    service: Service = request.app.state.service
    body.check(service)
    outputs = len(body.prompt) * body.choices
    use = await SessionUse.open(request.app.state.sessions, service, request.state.key, body, outputs=outputs)
    choices = await submit(body, service, use, request.app.state.constraints)
    answer = Answer(
        service,
        choices,
        use,
        num_prompts=len(body.prompt),
        echo=bool(body.echo),
        logprobs=body.logprobs is not None,
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
    )
    streams = [choice.output.stream for choice in choices]
    return await responded(answer, streams, as_events=bool(body.stream))


async def submit(body: CompletionBody, service: Service, use: SessionUse, constraints: Constraints) -> list[Choice]:
    """Queue the requests of all choices, or none. Choice i of prompt p has the index p n + i."""
    stops, wanted = body.stops(service), body.logprobs
    options: dict[str, Any] = {"prefix_group": use.prefix_group, "keep_state": use.keeps, "logprobs": wanted}
    if body.echo and wanted is not None:
        options["prompt_logprobs"] = wanted
    constraint = constraint_of(body.response_format, body.structured_outputs)
    if constraint is not None:
        options["grammar"] = await constraints.compile(constraint)
    requests: list[tuple[Prompt, EngineRequest, Snapshot | None]] = []
    num_tokens = num_logprobs = 0
    for given in body.prompt:
        prompt = await read_prompt(given, service, use)
        most = body.new_tokens(use.num_tokens, service, DEFAULT_MAX_TOKENS)
        num_tokens += body.choices * len(prompt.tokens)
        num_logprobs += body.choices * body.num_logprobs(len(prompt.tokens), most)
        check_size(num_tokens, num_logprobs)
        if body.repetition_penalty not in (None, 1):
            options["counted"] = counted(prompt, use, service.tokenizer.document_start)
        for i in range(body.choices):
            made = await off_loop(
                len(use.prompt), body.to_request, use.prompt, most, service, stops, choice=i, **options
            )
            requests.append((prompt, made, use.after))
    choices: list[Choice] = []
    try:
        for prompt, made, after in requests:
            stream = await service.submit(made, after)
            begin = stream.generation.output_start
            before = stream.generation.seen[max(0, begin - CONTEXT) : begin]
            output = Output(stream, service.tokenizer, stops, logprobs=wanted is not None, after=before)
            choices.append(Choice(len(choices), prompt, output))
    except BaseException:
        for choice in choices:
            choice.output.stream.cancel()
        raise
    return choices


def check_size(num_tokens: int, num_logprobs: int) -> None:
    """Raise ApiError for a request that would take too much of the host's memory."""
    if num_tokens > MAX_TOKENS:
        raise ApiError(
            400, f"the prompts have {num_tokens} tokens, each counted n times; accepted: {MAX_TOKENS}", param="prompt"
        )
    if num_logprobs > MAX_LOGPROBS:
        raise ApiError(
            400,
            f"the response could have {num_logprobs} log-probabilities; accepted: {MAX_LOGPROBS}, with fewer tokens, "
            "choices or logprobs",
            param="logprobs",
        )


async def read_prompt(given: str | list[int], service: Service, use: SessionUse) -> Prompt:
    """The tokens of a prompt: of a new context, or those that continue a session.

    Raises ApiError for a text without tokens, and for ids outside the vocabulary.
    """
    text = given if isinstance(given, str) else None
    tokens = given if isinstance(given, list) else await encoded(given, service)
    check_tokens(tokens, service.vocab_size, "prompt")
    begin = 0
    if use.session is None and (text is not None or not tokens):
        tokens, text, begin = [service.tokenizer.document_start, *tokens], text or "", 1
    await use.go_on(tokens)
    return Prompt(tokens, text, begin)


def counted(prompt: Prompt, use: SessionUse, start: int) -> set[int]:
    """The tokens of the context that a repetition penalty counts: without the document start before a text."""
    earlier = set() if use.after is None else set(use.after.tokens) - {start}
    return earlier.union(prompt.tokens[prompt.begin :])


async def encoded(text: str, service: Service) -> Sequence[int]:
    """The tokens of a text."""
    try:
        return await off_loop(len(text), service.tokenizer.encode, text)
    except ValueError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from error
