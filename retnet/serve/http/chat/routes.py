"""`/v1/chat/completions`: answers to conversations, which the model's chat template writes as one text.

The repetition penalty counts the output and the texts of the messages, but neither the template's own text nor its
special tokens. The other penalties count the output alone.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import Field, PlainValidator

from retnet.data.chat_template import ChatTemplate, TemplateError, find_chat_template
from retnet.models.decode.sampling import TOP_LOGPROBS
from retnet.serve.http.api.completion_answer import Prompt
from retnet.serve.http.api.fields import SamplingFields, Stops, check_tokens, wrong
from retnet.serve.http.api.json_body import JsonRoute
from retnet.serve.http.api.output import Output
from retnet.serve.http.api.refused import REFUSED, Refusals
from retnet.serve.http.api.sse import responded
from retnet.serve.http.chat.answer import ChatAnswer, ChatChoice
from retnet.serve.http.chat.messages import MAX_MESSAGES, Message
from retnet.serve.http.chat.tools import BEGIN, MAX_TOOLS, CallReader, Tool, ToolUse, tool_use
from retnet.serve.http.errors import ApiError
from retnet.serve.http.grammars.constraints import Constraint, constraint_of
from retnet.serve.http.service import Service
from retnet.serve.http.sessions.use import SessionUse
from retnet.serve.http.settings import Settings
from retnet.system.suggest import choices

DEFAULT_MAX_TOKENS = 4096  # where the context has no end
WRITTEN_AT_A_TIME = 2  # conversations: tokens of a body of megabytes take gigabytes while they are made
TOOL_FORMATS = ("hermes", "none")
MAX_OPTIONS = 64  # of a template

router = APIRouter(route_class=JsonRoute, tags=["chat"])


def _tool_choice(given: Any) -> Any:
    if not (given in ("none", "auto", "required") or isinstance(given, dict)):
        raise wrong('none, auto, required, or {"type": "function", "function": {"name": ...}}')
    return given


ToolChoice = Annotated[Any, PlainValidator(_tool_choice, json_schema_input_type=str | dict[str, Any])]


class ChatBody(SamplingFields):
    """A request to answer a conversation."""

    refused: ClassVar[Refusals] = REFUSED | {
        "audio": ((), "the model writes text"),
        "best_of": ((1,), "use n"),
        "chat_template": ((), "the server chooses it (--chat-template)"),
        "documents": (([],), "write them into a message"),
        "echo": ((False,), "use /v1/completions"),
        "function_call": (("none",), "use tool_choice"),
        "functions": (([],), "use tools"),
        "include_reasoning": ((True,), "the text is returned as the model writes it"),
        "modalities": ((["text"],), "the model writes text"),
        "prompt": ((), "use messages, or /v1/completions"),
        "reasoning_effort": (("none",), "use chat_template_kwargs, if the model's template knows it"),
        "verbosity": (("medium",), "say it in a message"),
        "web_search_options": ((), "use tools"),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The conversation; with session_id, what is new in it.",
        examples=[[{"role": "user", "content": "Hello"}]],
    )
    logprobs: bool | None = Field(
        None,
        description="Report the log-probability of every token: the model's own, before penalties, bias and "
        "temperature; -9999 stands for minus infinity.",
    )
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = Field(
        None, description=f"Report this many of the likeliest tokens, 0 to {TOP_LOGPROBS}. Needs logprobs."
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call, where its template and --tool-format know how."
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description='none, auto (the default), required, or {"type": "function", "function": {"name": ...}}. The last '
        "two are enforced by a grammar.",
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call per answer.")
    add_generation_prompt: bool | None = Field(None, description="false: do not begin an answer after the messages.")
    continue_final_message: bool | None = Field(
        None, description="Continue the last message, one of the assistant, instead of beginning an answer."
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_OPTIONS)] | None = Field(
        None, description="Further variables of the chat template, such as enable_thinking."
    )

    def check(self, service: Service) -> None:
        """Raise ApiError for values that do not go together, or not with this server."""
        self.check_model(service)
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs without logprobs; accepted with logprobs: true", param="top_logprobs")
        if self.choices > service.most_streams:
            raise ApiError(400, f"n is {self.choices}; accepted: at most {service.most_streams}", param="n")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ApiError(
                    400,
                    "continue_final_message with add_generation_prompt; accepted: one of the two",
                    param="continue_final_message",
                )
            last = self.messages[-1]
            if last.role != "assistant" or last.tool_calls:
                raise ApiError(
                    400,
                    f"continue_final_message after a message of {last.role}{' with calls' if last.tool_calls else ''}; "
                    "accepted: text of assistant",
                    param="continue_final_message",
                )
        for name in self.chat_template_kwargs or ():
            if name in RESERVED or name.startswith("_"):
                raise ApiError(
                    400, f"chat_template_kwargs has {name}, which the server sets", param="chat_template_kwargs"
                )


RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class ChatFormat:
    """A server's way of writing conversations.

    template: None refuses chats. tool_format: hermes, or none. turns: to write a conversation.
    """

    template: ChatTemplate | None
    tool_format: str
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(WRITTEN_AT_A_TIME))

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return () if self.template is None else self.template.stops

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer, beside those of the model and the tokenizer."""
        end = None if self.template is None else self.template.turn_end
        return () if end is None else (end,)

    @classmethod
    def of(cls, service: Service, settings: Settings) -> ChatFormat:
        """The format that the settings choose. Raises ValueError and OSError for a template that cannot be used."""
        template = find_chat_template(settings.chat_template, service.tokenizer, service.engine.model.directory)
        chosen = settings.tool_format
        if chosen not in (None, *TOOL_FORMATS):
            raise ValueError(f"the tool format is {chosen!r}; {choices(chosen, TOOL_FORMATS)}")
        if chosen is None:
            chosen = "hermes" if template is not None and template.mentions(BEGIN) else "none"
        return cls(template, chosen)


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat(body: ChatBody, request: Request) -> Response:
    """Answer a conversation. With `stream`, the response is a stream of server-sent events."""
    app: FastAPI = request.app
    service: Service = app.state.service
    form: ChatFormat = app.state.chat
    if form.template is None:
        raise ApiError(
            400, "this server has no chat template (--chat-template none); use /v1/completions", code="no_chat_template"
        )
    body.check(service)
    tools = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, form.tool_format)
    wanted = _constraint(body, tools)
    use = await SessionUse.open(app.state.sessions, service, request.state.key, body, outputs=body.choices)
    messages = use.messages + [message.for_template() for message in body.messages]
    async with form.turns:
        tokens, counted = await _encoded(form.template, body, messages, tools, use)
    await use.go_on_with(tokens)
    grammar = None if wanted is None else await app.state.constraints.compile(wanted)
    choices = await _submit(body, service, form, use, tools, grammar=grammar, counted=counted)
    answer = ChatAnswer(
        service,
        choices,
        use,
        messages,
        continued=bool(body.continue_final_message),
        logprobs=bool(body.logprobs),
        own_stops=body.stop or (),
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
    )
    streams = [choice.output.stream for choice in choices]
    return await responded(answer, streams, as_events=bool(body.stream))


def _constraint(body: ChatBody, tools: ToolUse) -> Constraint | None:
    """What the answers must look like."""
    wanted = constraint_of(body.response_format, body.structured_outputs)
    if not tools.enforced:
        return wanted
    if wanted is not None:
        raise ApiError(
            400,
            "tool_choice enforces a call, and response_format or structured_outputs another form; accepted: one",
            param="tool_choice",
        )
    return tools.constraint()


async def _encoded(
    template: ChatTemplate, body: ChatBody, messages: list[dict[str, Any]], tools: ToolUse, use: SessionUse
) -> tuple[list[int], list[int] | None]:
    """The tokens of the conversation, and those of them that the repetition penalty counts, if there is one.

    Written in another thread: a template may take long.
    """

    def encode() -> tuple[list[int], list[int] | None]:
        tokens = template.encode(
            messages,
            tools.for_template(),
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            known=() if use.session is None else use.session.snapshot.tokens,
            **(body.chat_template_kwargs or {}),
        )
        penalised = body.repetition_penalty not in (None, 1)
        return tokens, template.tokens_of_texts(messages) if penalised else None

    try:
        tokens, counted = await asyncio.to_thread(encode)
    except TemplateError as error:
        raise ApiError(400, str(error), param="messages", code="chat_template") from error
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error
    check_tokens(tokens, use.service.vocab_size, "messages")
    return tokens, counted


async def _submit(
    body: ChatBody,
    service: Service,
    form: ChatFormat,
    use: SessionUse,
    tools: ToolUse,
    **options: Any,
) -> list[ChatChoice]:
    """Queue the requests of all answers, or none. options: fields of the engine's request."""
    own = body.stops(service)
    stops = replace(own, strings=tuple(dict.fromkeys((*own.strings, *form.stops))))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    most = body.new_tokens(use.num_tokens, service, DEFAULT_MAX_TOKENS)
    options |= {"prefix_group": use.prefix_group, "keep_state": use.keeps}
    ends = {} if body.ignore_eos else dict.fromkeys(form.ends, "")
    all_stops = Stops(stops.strings, {**ends, **own.tokens})
    choices: list[ChatChoice] = []
    try:
        for i in range(body.choices):
            made = body.to_request(use.prompt, most, service, all_stops, choice=i, logprobs=logprobs, **options)
            stream = await service.submit(made, use.after)
            output = Output(stream, service.tokenizer, stops, logprobs=logprobs is not None)
            reader = CallReader(tools.several and not tools.named) if tools.reads_calls else None
            choices.append(ChatChoice(i, Prompt(use.prompt, None, 0), output, reader))
    except BaseException:
        for choice in choices:
            choice.output.stream.cancel()
        raise
    return choices
